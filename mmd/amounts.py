"""The kinds of value that say how much there is of a resource, or how much of it a model needs (mmd.config.Resources)."""

from typing import Any

from mmd.config import Gauge
from mmd.kinds import PERIOD, SIZE, WORD, BadValueError, Kind, bad_value, exactly, listing, number
from mmd.quantity import SIZE_PATTERN, format_duration, format_size

__all__ = ["AMOUNT", "RESOURCE"]

_NUMBER = number(0)
_PARTS = {"command": listing(WORD, at_least=1), "interval": PERIOD}


def _read_amount(value: Any) -> float:
    """A size as an int of bytes, a number as a float."""
    kind = SIZE if isinstance(value, str) else _NUMBER
    try:
        return kind.read(value)  # type: ignore[no-any-return]
    except BadValueError as error:
        raise bad_value(value, AMOUNT.noun, error.hint) from None


def _write_amount(amount: float) -> float | str:
    return format_size(amount) if isinstance(amount, int) else amount


def _read_resource(value: Any) -> float | Gauge:
    if isinstance(value, dict):
        return _read_gauge(value)
    try:
        return _read_amount(value)
    except BadValueError as error:
        raise bad_value(value, RESOURCE.noun, error.hint) from None


def _read_gauge(value: dict[str, Any]) -> Gauge:
    parts: dict[str, Any] = {}
    for key, part in value.items():
        if key not in _PARTS:
            raise BadValueError("unknown key", f"known: {', '.join(_PARTS)}", (key,))
        try:
            parts[key] = _PARTS[key].read(part)
        except BadValueError as error:
            raise BadValueError(error.message, error.hint, (key, *error.path)) from None
    if "command" not in parts:
        raise BadValueError("needs its command", 'write {command: ["df-free", "/scratch"]}')
    return Gauge(parts["command"], parts.get("interval", Gauge(()).interval_s))


def _write_resource(value: float | Gauge) -> Any:
    if not isinstance(value, Gauge):
        return _write_amount(value)
    return {"command": list(value.command), "interval": format_duration(value.interval_s)}


AMOUNT = Kind(
    f"{_NUMBER.noun}, or {SIZE.noun}",
    {"anyOf": [_NUMBER.schema, {"type": "string", "pattern": exactly(SIZE_PATTERN)}]},
    _read_amount,
    _write_amount,
)
RESOURCE = Kind(
    f"{AMOUNT.noun}, or {{command: [PROGRAM, ARGUMENT], interval: 1s}}",
    {
        "anyOf": [
            AMOUNT.schema,
            {
                "type": "object",
                "properties": {key: kind.schema for key, kind in _PARTS.items()},
                "required": ["command"],
                "additionalProperties": False,
            },
        ]
    },
    _read_resource,
    _write_resource,
)
