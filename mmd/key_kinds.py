"""The kinds of value in the file of API keys (mmd.keys), besides those that the configuration has.

Where a key may have been written by mistake, errors do not repeat the value.
"""

import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mmd.kinds import NAME, BadValueError, Kind, bad_value, exactly, integer, listing

__all__ = ["CONCURRENCY", "CREATED", "DIGEST", "ENTRIES", "GLOBS", "KEY_NAME", "KEY_PREFIX", "RATE", "SERIAL", "Limit"]

KEY_PREFIX = "mmd-"
_DIGEST = r"[0-9a-f]{64}"
_NAME = rf"(?!{KEY_PREFIX})[A-Za-z0-9][A-Za-z0-9._@-]{{0,62}}"
_PERIODS_S = {"s": 1, "min": 60, "h": 3600}
_RATE = rf"([1-9][0-9]{{0,5}})/({'|'.join(_PERIODS_S)})"
_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?(?:Z|[+-][0-9]{2}:[0-9]{2})"
_MOST = 1_000_000


class Limit(NamedTuple):
    """So many requests in so many seconds; it prints as `60/min`."""

    requests: int
    period_s: int

    def __str__(self) -> str:
        return f"{self.requests}/{next(unit for unit, period_s in _PERIODS_S.items() if period_s == self.period_s)}"


def _read_name(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(_NAME, value) is None:
        hint = f"1 to 63 letters, digits, and . _ @ - after the first; not {KEY_PREFIX}..., as keys begin"
        raise BadValueError(f"not {KEY_NAME.noun}", hint)
    return value


def _read_digest(value: Any) -> bytes:
    if not isinstance(value, str) or re.fullmatch(_DIGEST, value) is None:
        hint = "64 digits, 0-9 and a-f" if isinstance(value, str) else "64 digits, 0-9 and a-f, in quotes"
        raise BadValueError(f"not {DIGEST.noun}", hint)
    return bytes.fromhex(value)


def _read_rate(value: Any) -> Limit:
    match = re.fullmatch(_RATE, value) if isinstance(value, str) else None
    if match is None:
        raise bad_value(value, RATE.noun, "write 60/min, 5/s or 1000/h")
    return Limit(int(match[1]), _PERIODS_S[match[2]])


def _read_time(value: Any) -> datetime:
    try:
        if isinstance(value, str) and re.fullmatch(_TIME, value):
            return datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError):  # such as the 30th of February, or an offset that leads out of the calendar
        pass
    raise bad_value(value, CREATED.noun, "write 2026-01-31T12:00:00Z")


def _write_time(value: datetime) -> str:
    return value.isoformat().replace("+00:00", "Z")


def _read_entries(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadValueError(f"not {ENTRIES.noun}", "write NAME: on a line of its own under it")
    return value


def _pattern(pattern: str) -> dict[str, str]:
    return {"type": "string", "pattern": exactly(pattern)}


KEY_NAME = Kind("a key's name", _pattern(_NAME), _read_name)
DIGEST = Kind("the SHA-256 of a key", _pattern(_DIGEST), _read_digest, bytes.hex)
RATE = Kind("a rate such as 60/min", _pattern(_RATE), _read_rate, str)
CREATED = Kind("a time (RFC 3339)", _pattern(_TIME), _read_time, _write_time)
ENTRIES = Kind("a mapping of names", {"type": ["object", "null"]}, _read_entries)
GLOBS = listing(NAME, at_least=1)
CONCURRENCY = integer(1, _MOST)
SERIAL = integer(0, 10**15)
