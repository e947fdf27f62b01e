"""Text for unit files, which systemd reads back exactly (systemd.syntax(7), systemd.service(5), Command lines).

A unit is a list of directives, and `render` is the only function that makes text of them. A value that is not a constant of mmd
goes through the encoder for its kind of directive: `text`, `path`, `path_word`, `command_line` or `assignment`. An encoder
refuses what its kind cannot say. What gets past an encoder all the same is found when `render` reads the unit back.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Union

from mmd.errors import MmdError
from mmd.unitparser import Parsed, parse_unit

__all__ = [
    "COMMENT",
    "Block",
    "Directive",
    "Item",
    "Specified",
    "assignment",
    "command_line",
    "comment",
    "path",
    "path_word",
    "quote",
    "render",
    "text",
]

Directive = tuple[str, str]
"""Key and encoded value; with the key COMMENT a line for people."""

Item = Union[Directive, "Block"]
"""What a unit is made of."""

COMMENT = "#"

_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+-]+")
_PROGRAM = re.compile(r"/[^\x00-\x1f\x7f\\\"']*[^/\x00-\x1f\x7f\\\"']")  # string_is_safe() of systemd; and no folder
_SPECIAL = re.compile(r'[\\"\x00-\x1f\x7f%$]')
_NAMED = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\t": r"\t", "\r": r"\r", "%": "%%"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_UNENCODABLE = re.compile(
    "[\ud800-\udfff\ufdd0-\ufdef" + "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)) + "]"
)
"""Half surrogate pairs and noncharacters: systemd drops a line that holds one (utf8_is_valid()), and where it is escaped
`systemctl show` fails for the whole unit."""

_LINE_MAX_BYTES = 1_000_000
"""systemd refuses a unit with a longer line (LONG_LINE_MAX, 1 MiB), continued lines counted as one."""

_WORD_MAX_BYTES = 131_071
"""execve(2) refuses a longer argument or variable (MAX_ARG_STRLEN with its NUL)."""

_PATH_MAX_BYTES = 4095  # path_is_valid() of systemd: PATH_MAX with its NUL
_NAME_MAX_BYTES = 255

_CONTINUED = " \\\n"


class Specified(str):
    """A word with specifiers that are meant as they are, such as `%i`."""

    __slots__ = ()


def comment(line: str) -> Directive:
    """A line for people, whatever it holds."""
    return COMMENT, line


class Block:
    """Directives that are the same in every unit that has them, written down and taken apart once."""

    __slots__ = ("_intended", "_pairs", "text")

    def __init__(self, text: str) -> None:
        """`text`: of our own, `Key=value` and `# comment` lines."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.text = "\n".join(lines)
        self._pairs = [_split(line) for line in lines if not line.startswith("#")]
        self._intended: dict[str, list[Parsed]] = {}

    def intended(self, section: str) -> list[Parsed]:
        """What a reader is to find in it."""
        found = self._intended.get(section)
        if found is None:
            found = self._intended[section] = [(section, key, value) for key, value in self._pairs]
        return found


def _split(line: str) -> Directive:
    key, _, value = line.partition("=")
    return key, value


def text(value: str, *, setting: str) -> str:
    """The value of a directive that expands specifiers but knows neither quotes nor escapes, such as Description=.

    MmdError names `setting` when one line cannot hold it as it is.
    """
    _check_characters(value, setting)
    if _CONTROL.search(value):
        raise _refusal(value, setting, "holds a control character", "write it in one line")
    if value != value.strip(" "):
        raise _refusal(value, setting, "begins or ends with a blank", "remove the blank")
    if value.endswith("\\"):
        # Even an even number of them: the value may be put together with others later.
        raise _refusal(value, setting, "ends in a backslash, which joins lines of a unit file", "remove the backslash")
    return value.replace("%", "%%")


def path(value: str, *, setting: str) -> str:
    """An absolute path in a directive without quotes: WorkingDirectory=, SourcePath=, the end of LoadCredential=."""
    _check_path(value, setting)
    return text(value, setting=setting)


def path_word(value: str, *, setting: str, prefix: str = "") -> str:
    """An absolute path among several, with quotes: ReadWritePaths=. `prefix`: `-`, where it need not exist."""
    _check_path(value, setting)
    text(value, setting=setting)  # these directives undo `\\` and `\"`, but no escapes of control characters
    return quote(prefix + value, variables=False, setting=setting)


def quote(word: str, *, specified: str = "", variables: bool = True, setting: str = "") -> str:
    """One word of a list. Plain words stay bare, so that a unit reads like the command that it runs.

    `specified` is a text with specifiers (`%t/mmd-model/tiny@%i`) that is meant as it is wherever it occurs in the word. With
    `variables` the directive expands `$`. MmdError names `setting` when no escape can say it.
    """
    if _PLAIN.fullmatch(word) or isinstance(word, Specified):
        return word
    _check_characters(word, setting)
    if "\0" in word:
        raise _refusal(word, setting, "holds a NUL character", "remove it")
    if specified and specified in word:
        return '"' + specified.join(_escaped(piece, variables) for piece in word.split(specified)) + '"'
    return f'"{_escaped(word, variables)}"'


def command_line(words: Sequence[str], *, specified: str = "", setting: str = "") -> str:
    """An ExecStart= value: an option and its value per line. The program is one of mmd's own, without prefixes such as `+`."""
    if not _PROGRAM.fullmatch(words[0]):
        raise _refusal(words[0], setting, "is no path that a unit can start", "install mmd elsewhere")
    pieces: list[str] = []
    for word in words:
        if len(word) * 4 > _WORD_MAX_BYTES:
            _check_length(word, setting)
        pieces.append(f"{_CONTINUED}  " if word.startswith("-") else " ")
        pieces.append(quote(word, specified=specified, setting=setting))
    return "".join(pieces[1:])


def assignment(name: str, value: str, *, specified: str = "", setting: str = "") -> str:
    """An Environment= value: one variable."""
    if len(value) * 4 > _WORD_MAX_BYTES:
        _check_length(value, setting)
    return quote(f"{name}={value}", specified=specified, variables=False, setting=setting)


def render(sections: Iterable[tuple[str, Iterable[Item]]], *, header: Iterable[str] = ()) -> str:
    """The text of a unit; MmdError when systemd would read anything else in it than these directives in this order."""
    lines = [f"# {_printable(line)}" for line in header]
    intended: list[Parsed] = []
    for section, items in sections:
        lines.append(f"[{section}]")
        for item in items:
            if isinstance(item, Block):
                lines.append(item.text)
                intended += item.intended(section)
                continue
            key, value = item
            if key == COMMENT:
                lines.append(f"# {_printable(value)}")
                continue
            lines.append(f"{key}={value}")
            if len(value) * 4 > _LINE_MAX_BYTES and len(value.encode()) > _LINE_MAX_BYTES:
                raise MmdError(f"{key}= takes {len(value)} characters; a unit file has room for {_LINE_MAX_BYTES} bytes")
            # systemd replaces the backslash by a blank.
            intended.append((section, key, value.replace(_CONTINUED, "  ") if "\n" in value else value))
        lines.append("")
    whole = "\n".join(lines)
    found = parse_unit(whole)
    if found != intended:
        raise _mismatch(intended, found)
    return whole


def _mismatch(intended: list[Parsed], found: list[Parsed]) -> MmdError:
    pairs = zip([*intended, ("", "", "")], [*found, ("", "", "")], strict=False)
    (_, key, value), (_, got, taken) = next(pair for pair in pairs if pair[0] != pair[1])
    return MmdError(
        f"its unit would hold {got or 'nothing'}={_short(taken)} in the place of {key or 'nothing'}={_short(value)}",
        hint="avoid blanks, backslashes and control characters in it",
    )


def _printable(line: str) -> str:
    return line if line.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def _check_characters(value: str, setting: str) -> None:
    if not value.isascii() and (found := _UNENCODABLE.search(value)):
        character = f"U+{ord(found[0]):04X}"
        raise _refusal(value, setting, f"holds {character}, which is no character", "remove it")


def _check_length(word: str, setting: str) -> None:
    if len(word.encode(errors="replace")) > _WORD_MAX_BYTES:
        raise _refusal(word, setting, f"is longer than {_WORD_MAX_BYTES} bytes", "put it into a file")


def _check_path(value: str, setting: str) -> None:
    """What systemd's path_is_valid() and path_is_normalized() say."""
    if not value.startswith("/"):
        raise _refusal(value, setting, "is not an absolute path", "begin it with /")
    names = value.split("/")
    if ".." in names or "." in names:
        raise _refusal(value, setting, "has . or .. in it", "write the path without them")
    encoded = value.encode(errors="replace")
    if len(encoded) > _PATH_MAX_BYTES or any(len(name) > _NAME_MAX_BYTES for name in encoded.split(b"/")):
        raise _refusal(value, setting, "is too long for a path", f"at most {_NAME_MAX_BYTES} bytes between two /")


def _refusal(value: str, setting: str, what: str, hint: str) -> MmdError:
    said = f"{_short(value)} {what}"
    return MmdError(f"{setting}: {said}" if setting else said, hint=hint)


def _short(value: str) -> str:
    return ascii(value) if len(value) <= 100 else f"{value[:60]!a}..."


def _escaped(piece: str, variables: bool) -> str:
    def one(match: re.Match[str]) -> str:
        char = match[0]
        if char == "$":
            return "$$" if variables else "$"
        return _NAMED.get(char) or f"\\x{ord(char):02x}"

    return _SPECIAL.sub(one, piece)
