"""What the gateway asks of who may write models.d, and the answer: one JSON object each way.

`{"add": {NAME: SETTINGS}, "replace": BOOL}` or `{"remove": NAME}`; what was registered, or why nothing was. In a system
instance mmd-registrar@.service answers, on a Unix socket; in a user's own the gateway may do by itself what that would.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmd.registry import Fault, RegistryError, add, remove
from mmd.scope import Scope

__all__ = ["REQUEST_BYTES", "Registration", "carry_out", "read_reply"]

REQUEST_BYTES = 1 << 20
"""The longest request: as much as the gateway's application takes in a body."""


class Registration(NamedTuple):
    """What was done."""

    files: tuple[Path, ...]
    """Written or removed."""
    models: Mapping[str, str]
    """The revision of each that was added."""


def carry_out(scope: Scope, request: bytes) -> bytes:
    """Do what a request asks for, if it is right, and answer it: a line without its end. Nothing is raised."""
    try:
        done = _carry_out(scope, request)
    except RegistryError as error:
        return json.dumps({"fault": error.fault, "message": error.message, "hint": error.hint, "key": error.key}).encode()
    return json.dumps({"files": [str(file) for file in done.files], "models": dict(done.models)}).encode()


def _carry_out(scope: Scope, request: bytes) -> Registration:
    try:
        asked = json.loads(request)
    except (ValueError, RecursionError) as error:
        raise RegistryError(Fault.INVALID, f"the request is not JSON: {error}") from error
    match asked:
        case {"add": dict(models), "replace": bool(replace), **rest} if not rest:
            added = add(scope, models, replace=replace)
            return Registration(tuple(added.files), added.models)
        case {"remove": str(name), **rest} if not rest:
            return Registration((remove(scope, name),), {})
    raise RegistryError(Fault.INVALID, "the request is neither {add, replace} nor {remove}")


def read_reply(reply: bytes) -> Registration:
    """What an answer says; RegistryError when that is why nothing was done."""
    try:
        raw: dict[str, Any] = json.loads(reply)
        if "fault" in raw:
            raise RegistryError(Fault(raw["fault"]), raw["message"], hint=raw["hint"], key=raw["key"])
        return Registration(tuple(map(Path, raw["files"])), raw["models"])
    except (ValueError, KeyError, TypeError) as error:
        message = "the registrar broke off" if not reply else f"the registrar's answer is not understood: {error!r}"
        raise RegistryError(Fault.UNWRITABLE, message, hint="journalctl -u 'mmd-registrar@*'") from error
