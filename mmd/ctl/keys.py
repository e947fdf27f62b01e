"""`mmdctl keys`: adds, lists and revokes API keys. A new key is printed once, on standard output alone, and kept nowhere."""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mmd.ctl.client import DownError, RefusedError
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.key_file import KeyFile
from mmd.ctl.table import Cell, Column, table
from mmd.key_kinds import KEY_NAME
from mmd.keys import KEY, KEY_BYTES, Key, KeyRing, KeyScope, digest, key_text
from mmd.kinds import BadValueError, Kind
from mmd.setting import Setting

__all__ = ["Request", "add", "list_keys", "revoke"]

_GATEWAY = "mmd-gateway.service"
_UNSUPPORTED = (404, 405)
"""What a gateway answers that knows no PUT /api/v1/keys."""
_REPLACED = 503
_AGAIN_S = 0.5
_NONE = "-"
_COLUMNS = (
    Column("NAME"),
    Column("SCOPE"),
    Column("MODELS", elastic=True),
    Column("RATE", right=True),
    Column("CONCURRENCY", right=True, drop=2),
    Column("CREATED", drop=1),
)


@dataclass(frozen=True, slots=True)
class Request:
    """The key that is wanted, as typed."""

    name: str
    scope: str
    models: Sequence[str]
    rate: str | None
    concurrency: int | None

    def key(self, secret: str) -> Key:
        """That key; CtlError for what is not understood."""
        raw = {"scope": self.scope, "models": list(self.models), "rate": self.rate, "concurrency": self.concurrency}
        values = {name: _read(_kind(name), value, f"--{name}") for name, value in raw.items() if value not in (None, [])}
        limits = [f"--{name}" for name in ("models", "rate", "concurrency") if name in values]
        if values.get("scope") is KeyScope.READ and limits:
            message = f"{', '.join(limits)}: limits inference, which a key of the scope read is not good for"
            raise CtlError(message, hint="leave it out; such a key sees all models", exit_code=Exit.USAGE)
        created = datetime.now(UTC).replace(microsecond=0)
        return Key(_read(KEY_NAME, self.name, "NAME"), digest(secret.encode()), created=created, **values)


def add(context: Context, request: Request, *, as_json: bool) -> Exit:
    """Adds a key and prints it: the line on standard output is the key, or JSON that holds it."""
    secret = key_text(secrets.token_bytes(KEY_BYTES))
    key = request.key(secret)
    file = KeyFile.of(context)
    with file.locked():
        before = file.read()
        ring = before.add(key)
        file.write(ring)
        # Before the gateway is told, which may fail: nobody can tell the key a second time.
        print(json.dumps({"name": key.name, "key": secret, **key.plain()}) if as_json else secret, flush=True)
        _say(f"{key.name}: added to {file.path}; the key is shown this once")
        if not before.required:
            _say("the first key: from now on, whoever has none is refused")
        _bring_into_use(context, ring)
    return Exit.OK


def list_keys(context: Context, *, as_json: bool) -> Exit:
    """Prints the keys' names and what they may do."""
    file = KeyFile.of(context)
    ring = file.read()
    if as_json:
        print(json.dumps([{"name": key.name, **key.plain()} for key in ring.keys], indent=2))
    elif ring.keys:
        print("\n".join(table(_COLUMNS, [_row(key) for key in ring.keys], context.terminal)))
    else:
        _say(_no_keys(context, ring))
    return Exit.OK


def revoke(context: Context, name: str, *, as_json: bool) -> Exit:
    """Takes a key out of the file and out of use."""
    _read(KEY_NAME, name, "NAME")
    file = KeyFile.of(context)
    with file.locked():
        before = file.read()
        ring = before.revoke(name)
        key = before.named(name)
        file.write(ring)
        if as_json and key is not None:
            print(json.dumps({"name": name, **key.plain()}), flush=True)
        _say(f"{name}: taken out of {file.path}")
        if not ring.keys:
            _say(_no_keys(context, ring))
        _bring_into_use(context, ring)
    return Exit.OK


def _bring_into_use(context: Context, ring: KeyRing) -> None:
    """Tells the gateway, and says from when on the change counts."""
    restart = shlex.join((*context.systemctl, "restart", _GATEWAY))
    try:
        _tell(context, ring)
    except DownError:
        _say("mmd-gateway is not running; it reads the keys when it starts")
    except CtlError as error:
        if not isinstance(error, RefusedError) or error.status not in _UNSUPPORTED:
            message = f"the file is changed, but mmd-gateway goes on with the keys that it has: {error.message}"
            raise CtlError(message, hint=f"{restart}    # reads the file; models go on", exit_code=error.exit_code) from error
        _say(f"mmd-gateway takes it up at its next restart; models go on meanwhile:\n  {restart}")
    else:
        _say("mmd-gateway has taken it up")


def _tell(context: Context, ring: KeyRing) -> None:
    """Once more if an upgrade has replaced the process that was asked: the next connection is to the fresh one."""
    try:
        context.client.put_keys(ring.render())
    except RefusedError as error:
        if error.status != _REPLACED:
            raise
        time.sleep(_AGAIN_S)
        context.client.put_keys(ring.render())


def _no_keys(context: Context, ring: KeyRing) -> str:
    if not ring.required:
        return f"no key is asked for; the first one: {context.command('keys', 'add', 'NAME')}"
    file = KeyFile.of(context)
    return f"no key is left, so that everybody is refused; remove {file.path} and restart the gateway to ask for none"


def _row(key: Key) -> list[Cell]:
    plain = key.plain()
    limits = (str(plain.get(limit, _NONE)) for limit in ("rate", "concurrency", "created"))
    return [Cell(text) for text in (key.name, str(key.scope), ", ".join(key.models) or "all", *limits)]


def _kind(name: str) -> Kind:
    entry = KEY.entries[name]
    assert isinstance(entry, Setting)
    return entry.kind


def _read(kind: Kind, value: Any, what: str) -> Any:
    try:
        return kind.read(value)
    except BadValueError as error:
        raise CtlError(f"{what}: {error.message}", hint=error.hint, exit_code=Exit.USAGE) from None


def _say(text: str) -> None:
    """On standard error, so that standard output is the answer alone."""
    print(text, file=sys.stderr)
