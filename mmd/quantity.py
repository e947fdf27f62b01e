"""Quantities as people write them: sizes (`18GiB`), durations (`250ms`), parameter counts (`7.6B`).

Each kind has a pattern (also used by the JSON Schema, hence without anchors), a parser and a formatter. Parsers raise MmdError.
"""

import re
from collections.abc import Mapping

from mmd.errors import MmdError

__all__ = [
    "COUNT_PATTERN",
    "DURATION_PATTERN",
    "SIZE_PATTERN",
    "format_count",
    "format_duration",
    "format_size",
    "human_duration",
    "human_size",
    "parse_count",
    "parse_duration",
    "parse_size",
    "size_on_gpus",
]

_SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
# Units as fractions, so that 250ms is 0.25 exactly and not 250 * 0.001.
_DURATION_UNITS: Mapping[str, tuple[int, int]] = {
    "us": (1, 1_000_000),
    "ms": (1, 1000),
    "s": (1, 1),
    "min": (60, 1),
    "h": (3600, 1),
    "d": (86400, 1),
}
_COUNT_UNITS: Mapping[str, int] = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,9})?)"
SIZE_PATTERN = rf"{_NUMBER} ?({'|'.join(_SIZE_UNITS)})"
DURATION_PATTERN = rf"{_NUMBER} ?({'|'.join(_DURATION_UNITS)})"
COUNT_PATTERN = rf"{_NUMBER} ?({'|'.join(_COUNT_UNITS)})"


def parse_size(text: str) -> int:
    """Bytes: `18GiB`, `2GB`, `512MiB`. The unit is required, so that nobody has to guess."""
    number, unit = _split(SIZE_PATTERN, text, "a size", "write 18GiB, 512MiB or 2GB")
    return round(float(number) * _SIZE_UNITS[unit]) if "." in number else int(number) * _SIZE_UNITS[unit]


def format_size(size_bytes: int) -> str:
    """The shortest exact way to write a size: the largest unit that divides it."""
    if size_bytes == 0:
        return "0B"
    fitting = (unit for unit in ("TiB", "GiB", "TB", "GB", "MiB", "MB", "KiB", "KB") if size_bytes % _SIZE_UNITS[unit] == 0)
    unit = next(fitting, "B")
    return f"{size_bytes // _SIZE_UNITS[unit]}{unit}"


def human_size(size_bytes: float) -> str:
    """A size for people, in GiB with one digit: `14.2 GiB`."""
    return f"{size_bytes / (1 << 30):.1f} GiB"


def size_on_gpus(size_bytes: float, gpus: int) -> str:
    """`14.2 GiB`, or `2 x 14.2 GiB`: that much on each of two GPUs."""
    return f"{gpus} x {human_size(size_bytes)}" if gpus > 1 else human_size(size_bytes)


def human_duration(duration_s: float) -> str:
    """A duration for people: `0.25 s`, `1.8 s`, `42 s`, `5 min`, `2.5 h`."""
    if duration_s < 1:
        return f"{duration_s:.2f} s"
    if duration_s < 10:
        return f"{duration_s:.1f} s"
    if duration_s < 120:
        return f"{duration_s:.0f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"


def parse_duration(text: str) -> float:
    """Seconds: `250ms`, `30s`, `5min`, `2h`, `1d`."""
    number, unit = _split(DURATION_PATTERN, text, "a duration", "write 250ms, 30s, 5min or 2h")
    numerator, denominator = _DURATION_UNITS[unit]
    return float(number) * numerator / denominator


def format_duration(duration_s: float) -> str:
    """The shortest exact way to write a duration, down to microseconds."""
    microseconds = round(duration_s * 1_000_000)
    if microseconds == 0:
        return "0s"
    for unit in ("d", "h", "min", "s", "ms"):
        numerator, denominator = _DURATION_UNITS[unit]
        length = numerator * 1_000_000 // denominator
        if microseconds % length == 0:
            return f"{microseconds // length}{unit}"
    return f"{microseconds}us"


def parse_count(text: str) -> float:
    """A number of parameters: `7.6B`, `350M`."""
    number, unit = _split(COUNT_PATTERN, text, "a number of parameters", "write 7.6B or 350M")
    return float(round(float(number) * _COUNT_UNITS[unit]))


def format_count(count: float) -> str:
    """The number of parameters as model cards write it: `7.6B`."""
    unit = next((unit for unit in ("T", "B", "M") if count >= _COUNT_UNITS[unit]), "K")
    number = f"{count / _COUNT_UNITS[unit]:.9f}".rstrip("0").rstrip(".")
    return f"{number}{unit}"


def _split(pattern: str, text: str, noun: str, hint: str) -> tuple[str, str]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise MmdError(f"{text!r} is not {noun}", hint=hint)
    return match[1], match[2]
