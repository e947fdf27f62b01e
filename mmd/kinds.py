"""The kinds of value that a setting may have. Each says the same thing twice: as JSON Schema, and as a reading function.

Patterns are written in the part of the syntax that Python and ECMA 262 share, since both languages read the schema.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmd.config import Device, Listen
from mmd.quantity import (
    COUNT_PATTERN,
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_count,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_size,
)

__all__ = [
    "ADDRESS",
    "ANY",
    "BOOLEAN",
    "COUNT",
    "DEVICE",
    "DURATION",
    "ENGINE_LISTEN",
    "GPUS",
    "HTTP_PATH",
    "ID",
    "NAME",
    "PATH",
    "PERIOD",
    "PERIOD_OR_OFF",
    "POSITIVE_SIZE",
    "RAM",
    "RESOURCE_NAME",
    "SIZE",
    "SLEEP_LEVEL",
    "TCP_ADDRESS",
    "TEXT",
    "URL",
    "USER",
    "VARIABLE_NAME",
    "VRAM",
    "WORD",
    "BadValueError",
    "Kind",
    "bad_value",
    "choice",
    "exactly",
    "integer",
    "listing",
    "mapping",
    "number",
]


class BadValueError(Exception):
    """A value of the wrong kind; `path` leads from the setting to the part that is wrong."""

    def __init__(self, message: str, hint: str = "", path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = path


class Kind(NamedTuple):
    """A kind of value."""

    noun: str
    """How the manual names it: `size`, `true or false`."""
    schema: Mapping[str, Any]
    read: Callable[[Any], Any]
    """The value as mmd.config holds it; BadValueError."""
    write: Callable[[Any], Any] = lambda value: value
    """The inverse: the value as YAML has it."""
    none: str = ""
    """The word that stands for None, where there is one."""


# Characters of a wrong value that are shown.
_SHOWN_MAX = 200


def exactly(pattern: str) -> str:
    """`pattern` for the whole of a string; `$` would let a final newline pass in Python."""
    return rf"^(?:{pattern})(?![\s\S])"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    """Whether JSON Schema calls it an integer, which 1.0 is."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def bad_value(value: object, noun: str, hint: str = "") -> BadValueError:
    """The error for a value that is not `noun`."""
    if value is None:
        return BadValueError(f"has no value; it must be {noun}", hint)
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    if len(shown) > _SHOWN_MAX:  # an error travels: into logs, answers and messages between processes
        shown = f"{shown[:_SHOWN_MAX]}..."
    return BadValueError(f"{shown} is not {noun}", hint)


def _matching(
    noun: str, pattern: str, hint: str = "", *, make: Callable[[str], Any] = str, write: Callable[[Any], Any] = str
) -> Kind:
    """A string that matches `pattern` as a whole."""

    def read(value: Any) -> Any:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise bad_value(value, noun, hint)
        return make(value)

    return Kind(noun, {"type": "string", "pattern": exactly(pattern)}, read, write)


class _Quantity(NamedTuple):
    """A number with a unit."""

    pattern: str
    parse: Callable[[str], Any]
    write: Callable[[Any], str]
    hint: str


def _quantity(noun: str, quantity: _Quantity, *, positive: bool = False) -> Kind:
    """A number with its unit; a bare 0 needs none."""
    pattern = quantity.pattern
    whole = rf"(?=[^1-9]*[1-9]){pattern}" if positive else pattern
    text = {"type": "string", "pattern": exactly(whole)}

    def read(value: Any) -> Any:
        if not positive and _is_number(value) and value == 0:
            return 0
        if not isinstance(value, str) or re.fullmatch(whole, value) is None:
            raise bad_value(value, noun, quantity.hint)
        return quantity.parse(value)

    return Kind(noun, text if positive else {"anyOf": [text, {"const": 0}]}, read, quantity.write)


def _or_word(kind: Kind, words: tuple[str, ...]) -> Kind:
    """`kind`, or one of `words`, which read as None."""
    noun = f"{kind.noun}, or {' or '.join(words)}"

    def read(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return None
        try:
            return kind.read(value)
        except BadValueError as error:
            raise bad_value(value, noun, error.hint) from None

    def write(value: Any) -> Any:
        return words[0] if value is None else kind.write(value)

    return Kind(noun, {"anyOf": [kind.schema, {"enum": list(words)}]}, read, write, words[0])


def _read_any(value: Any) -> Any:
    """What JSON can say; YAML can say more."""
    if isinstance(value, dict):
        return {str(key): _read_any(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_read_any(part) for part in value]
    if value is None or isinstance(value, str | bool | int) or _is_number(value):
        return value
    raise bad_value(value, "a value that JSON knows", "text, a number, true, false, null, a list or a mapping")


def _read_boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_value(value, BOOLEAN.noun, "no quotes, and neither yes nor no")
    return value


def _read_word(value: Any) -> str:
    if _is_whole(value):
        return str(value)
    if not isinstance(value, str):  # 1.10 would become 1.1, and true could mean True
        raise bad_value(value, WORD.noun, "quote it" if isinstance(value, bool | float) else "")
    if found := re.search(f"[{_UNSAYABLE}]", value):
        raise BadValueError(f"holds U+{ord(found[0]):04X}, which no command line, environment or unit can", "remove it")
    return value


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise bad_value(value, TEXT.noun, "quote it")
    return _read_word(value)


def integer(minimum: int, maximum: int) -> Kind:
    """A whole number within bounds."""
    noun = f"a whole number from {minimum} to {maximum}"

    def read(value: Any) -> int:
        if not _is_whole(value) or not minimum <= value <= maximum:
            raise bad_value(value, noun)
        return int(value)

    return Kind(noun, {"type": "integer", "minimum": minimum, "maximum": maximum}, read)


def number(minimum: float) -> Kind:
    """A number, whole or not, of at least `minimum`."""
    noun = f"a number of at least {minimum:g}"

    def read(value: Any) -> float:
        if not _is_number(value) or value < minimum:
            raise bad_value(value, noun)
        return float(value)

    return Kind(noun, {"type": "number", "minimum": minimum}, read)


def choice(words: Iterable[str], *, make: Callable[[str], Any] = str, later: tuple[str, ...] = ()) -> Kind:
    """One of `words`; those in `later` are known but not yet supported."""
    known = [str(word) for word in words]
    noun = " or ".join(known)

    def read(value: Any) -> Any:
        if isinstance(value, str) and value in known:
            return make(value)
        if isinstance(value, str) and value in later:
            raise BadValueError(f"not yet supported: {value}", f"use {noun}")
        raise bad_value(value, noun)

    return Kind(noun, {"enum": known}, read, str)


def listing(item: Kind, *, at_least: int = 0) -> Kind:
    """A list of values of one kind."""
    noun = f"a list, each {item.noun}"

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise bad_value(value, noun, "write [a, b]")
        if len(value) < at_least:
            raise BadValueError(f"needs at least {at_least} item")
        items = []
        for index, part in enumerate(value):
            try:
                items.append(item.read(part))
            except BadValueError as error:
                raise BadValueError(error.message, error.hint, (index, *error.path)) from None
        return tuple(items)

    def write(values: Any) -> list[Any]:
        return [item.write(value) for value in values]

    schema = {"type": "array", "items": item.schema}
    return Kind(noun, {**schema, "minItems": at_least} if at_least else schema, read, write)


def mapping(names: Kind, item: Kind) -> Kind:
    """A mapping from names that the user chooses to values of one kind."""
    noun = f"a mapping, each value {item.noun}"

    def read(value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise bad_value(value, noun, "write {name: value}")
        items = {}
        for name, part in value.items():
            try:
                items[names.read(name)] = item.read(part)
            except BadValueError as error:
                raise BadValueError(error.message, error.hint, (name, *error.path)) from None
        return items

    def write(values: Any) -> dict[str, Any]:
        return {name: item.write(value) for name, value in values.items()}

    schema = {"type": ["object", "null"], "propertyNames": names.schema, "additionalProperties": item.schema}
    return Kind(noun, schema, read, write)


def _read_gpus(value: Any) -> int | tuple[int | str, ...]:
    if isinstance(value, list):
        return tuple(listing(_GPU, at_least=1).read(value))
    return int(_GPU_COUNT.read(value))


def _read_gpu(value: Any) -> int | str:
    return _GPU_UUID.read(value) if isinstance(value, str) else _GPU_INDEX.read(value)  # type: ignore[no-any-return]


def _read_device(value: Any) -> Device:
    if not isinstance(value, dict):
        return Device(selector=_GPU.read(value))
    for key in value:
        if key != "memory":
            raise BadValueError("unknown key", "did you mean memory?", (key,))
    if "memory" not in value:
        raise BadValueError("needs its memory", "write {memory: 24GiB}")
    try:
        return Device(memory_bytes=POSITIVE_SIZE.read(value["memory"]))
    except BadValueError as error:
        raise BadValueError(error.message, error.hint, ("memory",)) from None


def _write_device(device: Device) -> Any:
    return device.selector if device.memory_bytes is None else {"memory": format_size(device.memory_bytes)}


def _read_level(value: Any) -> int:
    if value == "off":
        return 0
    if not _is_number(value) or value not in (1, 2):
        raise bad_value(value, SLEEP_LEVEL.noun)
    return int(value)


def _write_gpus(gpus: int | tuple[int | str, ...]) -> Any:
    return gpus if isinstance(gpus, int) else list(gpus)


def _engine_listen(text: str) -> tuple[Listen, int | None]:
    listen, _, port = text.partition(":")
    return Listen(listen), int(port) if port else None


def _write_listen(value: tuple[Listen, int | None]) -> str:
    listen, port = value
    return str(listen) if port is None else f"{listen}:{port}"


_PORT = r"(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_OCTET = r"(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_TCP = rf"(?:(?:localhost|(?:{_OCTET}\.){{3}}{_OCTET})|\[[0-9A-Fa-f:.]{{2,45}}\]):{_PORT}"
_NOT_UTF8 = r"\ud800-\udfff\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
"""Half surrogate pairs and noncharacters, which systemd does not take for text (mmd.unitfile). The ones beyond U+FFFF stand
here as they are, since the two languages escape them differently."""
_UNSAYABLE = rf"\x00{_NOT_UTF8}"
_CONTROL = rf"\x00-\x1f\x7f-\x9f\u2028\u2029{_NOT_UTF8}"
_ABSOLUTE = rf"(?!(?:[^/]*/)*\.\.?(?:/|$))/(?:[^{_CONTROL}]*[^{_CONTROL} \\])?"
_ADDRESS_HINT = "write 127.0.0.1:8000, [::1]:8000 or /path.sock; systemd resolves no host names"

NAME = _matching(
    "a name of 1 to 200 characters without control characters",
    rf"(?! )[^{_CONTROL}]{{0,199}}[^{_CONTROL} \\]",
    "it may not begin with a blank, nor end with one or with a backslash",
)
ID = _matching("a unit id", r"[a-z0-9][a-z0-9._-]{0,62}", "lower-case letters, digits, and . _ - after the first character")
USER = _matching(
    "a system user for engines",
    r"(?!(?:root|mmd|mmd-fetch|mmd-journal|mmd-probe|mmd-relay)(?![\s\S]))(?!mmd-m-)[a-z_][a-z0-9_-]{0,30}",
    "the name of one that exists, and is neither root nor one of mmd's own",
)
RESOURCE_NAME = _matching("a resource name", r"[a-z][a-z0-9._-]{0,62}", "lower-case letters, digits, . _ -")
VARIABLE_NAME = _matching("a name of an environment variable", r"[A-Za-z_][A-Za-z0-9_]*")
TEXT = Kind("text", {"type": "string", "not": {"pattern": f"[{_UNSAYABLE}]"}}, _read_text)
WORD = Kind("text or a whole number", {"anyOf": [TEXT.schema, {"type": "integer"}]}, _read_word)
ANY = Kind("any value", {}, _read_any)
BOOLEAN = Kind("true or false", {"type": "boolean"}, _read_boolean)
_SIZE = _Quantity(SIZE_PATTERN, parse_size, format_size, "write 18GiB, 512MiB or 2GB")
_DURATION = _Quantity(DURATION_PATTERN, parse_duration, format_duration, "write 250ms, 30s, 5min or 2h")
_COUNT = _Quantity(COUNT_PATTERN, parse_count, format_count, "write 7.6B or 350M")
SIZE = _quantity("a size such as 18GiB", _SIZE)
POSITIVE_SIZE = _quantity("a size above 0, such as 18GiB", _SIZE, positive=True)
VRAM = _or_word(POSITIVE_SIZE, ("auto",))
RAM = _or_word(SIZE, ("auto",))
WORKERS = _or_word(integer(1, 64), ("auto",))
NUMBER_OR_OFF = _or_word(integer(0, 1_000_000), ("off",))
DURATION = _quantity("a duration such as 30s", _DURATION)
PERIOD = _quantity("a duration above 0, such as 30s", _DURATION, positive=True)
PERIOD_OR_OFF = _or_word(PERIOD, ("off", "never"))
COUNT = _quantity("a number of parameters such as 7.6B", _COUNT, positive=True)
PATH = _matching(
    "an absolute path", _ABSOLUTE, "without . and .. in it, and without a blank or backslash at its end", make=Path
)
HTTP_PATH = _matching("a path that begins with /", r"/[!-~]*")
URL = _matching("a URL", r"https?://[!-~]+", "write http://host:port")
TCP_ADDRESS = _matching("a TCP address", _TCP, "write 127.0.0.1:8001 or [::1]:8001; systemd resolves no host names")
ADDRESS = _matching("an address", rf"{_TCP}|{_ABSOLUTE}", _ADDRESS_HINT)
ENGINE_LISTEN = _matching("tcp, tcp:PORT or unix", rf"tcp|tcp:{_PORT}|unix", make=_engine_listen, write=_write_listen)
SLEEP_LEVEL = Kind("1, 2 or off", {"enum": [1, 2, "off"]}, _read_level, lambda level: level or "off")
_GPU_COUNT = integer(0, 64)
_GPU_INDEX = integer(0, 6499)  # 64 GPUs, and their slices as mmd.names counts them
_GPU_UUID = _matching("a GPU's index or UUID", r"(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}", "see nvidia-smi -L")
_GPU = Kind("a GPU's index or UUID", {"anyOf": [_GPU_INDEX.schema, _GPU_UUID.schema]}, _read_gpu)
GPUS = Kind(
    "a number of GPUs, or a list of indexes or UUIDs",
    {"anyOf": [_GPU_COUNT.schema, {"type": "array", "items": _GPU.schema, "minItems": 1}]},
    _read_gpus,
    _write_gpus,
)
DEVICE = Kind(
    "an index, a UUID, or {memory: SIZE}",
    {
        "anyOf": [
            _GPU.schema,
            {
                "type": "object",
                "properties": {"memory": POSITIVE_SIZE.schema},
                "required": ["memory"],
                "additionalProperties": False,
            },
        ]
    },
    _read_device,
    _write_device,
)
