"""What a D-Bus worker can be asked, and the strict parser of it (pure).

In a system instance the worker is root, and its client may be an attacker who has taken over the gateway: any bytes may come.
A request is one line of JSON: an object with exactly the keys of its call, each of exactly its type. Units are model units.
"""

import json
import signal
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeGuard

from mmd.names import is_model_unit

__all__ = ["REQUEST_BYTES", "RequestError", "UnitCall", "UnitRequest", "parse_object", "parse_request"]

REQUEST_BYTES: Final = 2048
"""The longest request, without its line end; a unit's name has 255 characters at most."""

_ID_MAX: Final = 1 << 53  # an integer that JSON carries everywhere

_SIGNALS: Final = frozenset({int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGKILL)})
"""What ends an engine. Others have meanings of their own, SIGSTOP among them, and nobody here needs them."""

_WHOM: Final = frozenset({"all", "main", "control"})


class RequestError(ValueError):
    """A request that is not carried out: it is not of the form below. `id` is the request's own, where it has one."""

    def __init__(self, message: str, id_: int | None = None) -> None:
        super().__init__(message)
        self.id = id_


class UnitCall(StrEnum):
    """What can be asked of systemd, and nothing else."""

    LIST = "list"
    READ = "read"
    PROCESSES = "processes"
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    RESET_FAILED = "reset_failed"
    KILL = "kill"


_KEYS: Final[Mapping[UnitCall, frozenset[str]]] = {
    **{call: frozenset({"id", "call", "unit"}) for call in UnitCall},
    UnitCall.LIST: frozenset({"id", "call"}),
    UnitCall.KILL: frozenset({"id", "call", "unit", "whom", "signal"}),
}


class UnitRequest(NamedTuple):
    id: int
    call: UnitCall
    unit: str = ""
    """A model unit, of all calls but `list`."""
    whom: str = ""
    """Of `kill`: `main`, `control` or `all` processes."""
    signal: int = 0


def parse_request(line: bytes) -> UnitRequest:
    """The request in one line; RequestError when it is anything else."""
    raw = parse_object(line, REQUEST_BYTES)
    number = raw.get("id")
    if not _is_integer(number) or not 0 < number <= _ID_MAX:
        raise RequestError("`id` must be a positive integer")
    try:
        return _request(number, raw)
    except RequestError as error:
        raise RequestError(str(error), number) from None


def _request(number: int, raw: Mapping[str, Any]) -> UnitRequest:
    call = raw.get("call")
    if not isinstance(call, str) or call not in UnitCall.__members__.values():
        raise RequestError("`call` must be one of " + ", ".join(UnitCall))
    request = UnitRequest(number, UnitCall(call))
    if raw.keys() != _KEYS[request.call]:
        raise RequestError(f"{call} takes the keys " + ", ".join(sorted(_KEYS[request.call])))
    if request.call is UnitCall.LIST:
        return request
    unit = raw["unit"]
    if not isinstance(unit, str) or not is_model_unit(unit):
        raise RequestError("`unit` must be a model unit, such as mmd-model-ID@0-1.service")
    if request.call is not UnitCall.KILL:
        return request._replace(unit=unit)
    whom, sent = raw["whom"], raw["signal"]
    if not isinstance(whom, str) or whom not in _WHOM:
        raise RequestError("`whom` must be one of " + ", ".join(sorted(_WHOM)))
    if not _is_integer(sent) or sent not in _SIGNALS:
        raise RequestError("`signal` must be one of " + ", ".join(map(str, sorted(_SIGNALS))))
    return request._replace(unit=unit, whom=whom, signal=sent)


def parse_object(line: bytes, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a line from somebody hostile; RequestError for anything that RFC 8259 leaves open, too."""
    if len(line) > most_bytes:
        raise RequestError(f"a request has {most_bytes} bytes at most")
    try:
        # As UTF-8 by ourselves: json.loads would guess at UTF-16 and UTF-32, and let half surrogates through.
        raw = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        raise RequestError("a request is one JSON object in one line of UTF-8") from error
    if not isinstance(raw, dict):
        raise RequestError("a request is a JSON object")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RequestError("a key is there twice")
    return found


def _is_integer(value: object) -> TypeGuard[int]:
    return type(value) is int  # a bool is an int as well


def _refuse(constant: str) -> Any:
    raise RequestError(f"{constant} is not JSON")
