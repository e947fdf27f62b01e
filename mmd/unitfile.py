"""Text for unit files: quoting that systemd undoes exactly (systemd.syntax(7), systemd.service(5), Command lines)."""

import re
from collections.abc import Sequence

__all__ = ["Specified", "assignment", "command_line", "escape", "quote"]

_PLAIN = re.compile(r"[A-Za-z0-9_./:=,+-]+")
_SPECIAL = re.compile(r'[\\"\x00-\x1f\x7f%$]')
_NAMED = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\t": r"\t", "\r": r"\r", "%": "%%"}


def escape(text: str) -> str:
    """`text` for a directive that expands specifiers but knows no quotes, such as Description=; it must fit in one line."""
    return text.replace("%", "%%")


class Specified(str):
    """A word with specifiers that are meant as they are, such as `%i`."""

    __slots__ = ()


def quote(word: str, *, specified: str = "", variables: bool = True) -> str:
    """One word of a list. Plain words stay bare, so that a unit reads like the command that it runs.

    `specified` is a text with specifiers (`%t/mmd-model/tiny@%i`) that is meant as it is wherever it occurs in the word. With
    `variables` the directive expands `$`.
    """
    if _PLAIN.fullmatch(word) or isinstance(word, Specified):
        return word
    if specified and specified in word:
        return '"' + specified.join(_escaped(piece, variables) for piece in word.split(specified)) + '"'
    return f'"{_escaped(word, variables)}"'


def command_line(words: Sequence[str], *, specified: str = "") -> str:
    """An ExecStart= value: an option and its value per line."""
    pieces: list[str] = []
    for word in words:
        pieces.append(" \\\n  " if word.startswith("-") else " ")
        pieces.append(quote(word, specified=specified))
    return "".join(pieces[1:])


def assignment(name: str, value: str, *, specified: str = "") -> str:
    """An Environment= value: one variable."""
    return quote(f"{name}={value}", specified=specified, variables=False)


def _escaped(text: str, variables: bool) -> str:
    def one(match: re.Match[str]) -> str:
        char = match[0]
        if char == "$":
            return "$$" if variables else "$"
        return _NAMED.get(char) or f"\\x{ord(char):02x}"

    return _SPECIAL.sub(one, text)
