"""What mmdctl writes to: whether a person watches, how wide the window is, colours, and the one line that is rewritten."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TextIO

from mmd.printable import printable as escaped

__all__ = ["Colour", "LiveLine", "Terminal", "fit", "printable"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BLANKS = str.maketrans("\n\t", "  ")
_CLEAR_LINE = "\r\x1b[2K"
_CLEAR_SCREEN = "\x1b[H\x1b[J"


class Colour(StrEnum):
    """SGR parameters (console_codes(4)); the 16 colours that every theme defines."""

    PLAIN = ""
    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"
    BLUE = "34"
    CYAN = "36"


@dataclass(frozen=True, slots=True)
class Terminal:
    """The properties of standard output."""

    interactive: bool = False
    colour: bool = False
    unicode: bool = False
    width: int | None = None
    """Columns; None when nobody looks, so that nothing is cut that a script might read."""

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> "Terminal":
        """What `stream` is: colours only on a terminal and not with NO_COLOR (no-color.org) or TERM=dumb."""
        interactive = stream.isatty()
        dumb = environment.get("TERM", "dumb") == "dumb"
        return cls(
            interactive=interactive and not dumb,
            colour=interactive and not dumb and not environment.get("NO_COLOR"),
            unicode=(stream.encoding or "").lower().replace("-", "") == "utf8",
            width=shutil.get_terminal_size().columns if interactive else None,
        )

    def paint(self, text: str, colour: Colour) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour and text else text

    def fit(self, text: str, width: int | None = None) -> str:
        """`text` cut to `width` columns, or to the window."""
        return fit(text, self.width if width is None else width, ellipsis="…" if self.unicode else "...")

    def clear(self) -> str:
        """What to write before a screen that is drawn again."""
        return _CLEAR_SCREEN if self.interactive else ""


class LiveLine:
    """The last line of a terminal, rewritten while something goes on; nothing at all where nobody watches."""

    def __init__(self, terminal: Terminal, stream: TextIO | None = None) -> None:
        self._terminal = terminal
        self._stream = stream or sys.stdout
        self._shown = ""

    def show(self, text: str) -> None:
        """Puts `text` in place of the line that is shown."""
        text = self._terminal.fit(text)
        if self._terminal.interactive and text != self._shown:
            self._write(_CLEAR_LINE + text)
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            self._write(_CLEAR_LINE)
            self._shown = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def fit(text: str, width: int | None, *, ellipsis: str = "…") -> str:
    """`text` in at most `width` columns, its end replaced by an ellipsis; None does not cut."""
    if width is None or len(text) <= width:
        return text
    return text[: width - len(ellipsis)] + ellipsis if width > len(ellipsis) else text[: max(width, 0)]


def printable(text: str) -> str:
    """`text` as one line, without colours, control characters as escapes: an engine's log must not drive the terminal."""
    return escaped(_COLOUR.sub("", text.translate(_BLANKS)))
