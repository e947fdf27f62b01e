"""The engine's log: passed on line by line, kept in part, and read for progress."""

import re
from collections import deque
from collections.abc import Callable, Sequence

from mmd.engines.base import ProgressPattern
from mmd.printable import printable
from mmd.runner.secrets import Mask

__all__ = ["EngineLog"]

_TAIL_LINES = 40
_LINE_CHARACTERS = 1000
"""What is looked at and kept of a line."""

_LINE_MAX_BYTES = 64 << 10
"""Longer lines are passed on in pieces, as journald would cut them (LineMax=48K by default)."""

_SHAPES_MAX = 2000
"""A start has some hundred kinds of lines; a program that logs more says nothing about its progress."""

_BREAK = re.compile(rb"\r\n|\r|\n")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PERCENTAGE = re.compile(r"\d+(?:\.\d+)?%")
_DIGIT = re.compile(r"\d")


class EngineLog:
    """Takes the engine's output as it comes and hands whole lines to `pass_on`.

    A progress bar rewrites its line with carriage returns, ten times a second. Such an update is passed on only when it changes
    the status: one line for each percent at most.

    A line counts as progress when nothing of its *shape* was seen before. The shape is the line without the words that hold
    numbers (times, ports, counters, addresses), percentages excepted. So a start that repeats itself, be it "still waiting (3)"
    or an access log of our own health checks, makes no progress, however much it says.
    """

    def __init__(
        self, patterns: Sequence[ProgressPattern], out_of_memory: re.Pattern[str] | None, pass_on: Callable[[bytes], None]
    ) -> None:
        self._patterns = patterns
        self._out_of_memory = out_of_memory
        self._pass_on = pass_on
        self.mask = Mask()
        """Applied before anything is kept, passed on or understood."""
        self._rest = b""
        self._status_passed_on = ""
        self._shapes: set[int] = set()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.status = ""
        """How far the start has come, in words."""
        self.steps = 0
        """Grows with every line that is progress."""
        self.ran_out_of_memory = False
        self.closed = False

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines, oldest first, without colours and control characters."""
        return tuple(self._tail)

    def start_serving(self) -> None:
        """Loading is over: progress no longer matters, and what is said of memory from now on is another matter."""
        self._patterns = ()
        self._shapes.clear()
        self.ran_out_of_memory = False

    def feed(self, data: bytes) -> None:
        """More output. What has no line end yet is kept, but if it is a progress bar it is looked at already."""
        data = self._rest + data
        start = 0
        for end in _BREAK.finditer(data):
            if end[0] == b"\r" and end.end() == len(data):
                break  # may be half of \r\n
            self._line(data[start : end.start()], is_update=end[0] == b"\r")
            start = end.end()
        self._rest = data[start:]
        if len(self._rest) > _LINE_MAX_BYTES:
            self._line(self._cut(), is_update=False)
        elif b"%" in self._rest:
            self._understand(_text(self.mask.hide(self._rest)))

    def close(self) -> None:
        """The output has ended: the last line needs no line end."""
        self._line(self._rest, is_update=False)
        self._rest = b""
        self.closed = True

    def _cut(self) -> bytes:
        """Takes a piece from a line without end. What may be the beginning of a secret stays: neither half would be known."""
        whole = self.mask.hide(self._rest)
        end = max(0, len(whole) - max(0, self.mask.longest_bytes - 1))
        piece, self._rest = whole[:end], whole[end:]
        return piece

    def _line(self, raw: bytes, *, is_update: bool) -> None:
        raw = self.mask.hide(raw.rstrip(b"\r"))
        if not raw.strip():
            return
        line = _text(raw)
        self._understand(line)
        if not is_update or self.status != self._status_passed_on:
            self._status_passed_on = self.status
            self._pass_on(raw + b"\n")
            self._tail.append(line)

    def _understand(self, line: str) -> None:
        if self._out_of_memory is not None and self._out_of_memory.search(line):
            self.ran_out_of_memory = True
        shape = hash(_shape(line))
        if shape not in self._shapes and len(self._shapes) < _SHAPES_MAX:
            self._shapes.add(shape)
            self.steps += 1
        for pattern in self._patterns:
            match = pattern.pattern.search(line)
            if match:
                self.status = pattern.text.format(*match.groups())
                return


def _shape(line: str) -> str:
    """The line with each word that holds a digit replaced, percentages excepted."""
    return " ".join(word if _PERCENTAGE.match(word) or not _DIGIT.search(word) else "#" for word in line.split())


def _text(raw: bytes) -> str:
    """What is kept is shown on terminals, in answers and in `systemctl status`: control characters are escapes there."""
    text = _ESCAPE.sub("", raw[: 4 * _LINE_CHARACTERS].decode(errors="replace")).replace("\t", " ").rstrip()
    return printable(text)[:_LINE_CHARACTERS]
