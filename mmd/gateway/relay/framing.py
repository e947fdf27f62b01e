"""Where the body of a message ends (RFC 9112, 6.3), followed byte by byte, and how a body is framed for the other side.

Bodies are always taken out of their framing and framed anew: no chunk size, extension or trailer of one side is ever seen by
the other. Readers are stricter than the RFC where senders that we know of are, too: chunk extensions and trailers are refused.
"""

import re
from enum import IntEnum
from typing import Final, Protocol

from mmd.gateway.relay.head import MalformedError

__all__ = ["Body", "Chunked", "Empty", "Length", "ToTheEnd", "chunk", "last_chunk"]

# 15 digits: 2 to the 60. Python's int() alone would take signs, underscores and white space.
_SIZE_LINE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_SIZE_DIGITS_MAX: Final = 15

last_chunk: Final = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Body(Protocol):
    """A body being read."""

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What of `data` is content, and what follows the body: None while it has not ended. MalformedError."""

    def ends_at_eof(self) -> bool:
        """Whether the body is complete if the connection ends now."""


class Empty:
    """No body: HEAD, 204, 304."""

    __slots__ = ()

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        return b"", data

    def ends_at_eof(self) -> bool:
        return True


class Length:
    """Content-Length."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        self._left = length

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        left = self._left - len(data)
        if left > 0:
            self._left = left
            return data, None
        self._left = 0
        if left == 0:
            return data, b""
        return data[:left], data[left:]

    def ends_at_eof(self) -> bool:
        return False


class ToTheEnd:
    """No length at all: whatever comes until the connection ends (responses only)."""

    __slots__ = ()

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        return data, None

    def ends_at_eof(self) -> bool:
        return True


class _At(IntEnum):
    SIZE = 0
    DATA = 1
    DATA_END = 2
    LAST_END = 3


class Chunked:
    """Transfer-Encoding: chunked."""

    __slots__ = ("_at", "_held", "_left")

    def __init__(self) -> None:
        self._at = _At.SIZE
        self._held = b""
        self._left = 0

    def is_one(self, data: bytes) -> bool:
        """Whether `data` is exactly one chunk, as each event of a stream usually comes, written as `chunk` writes it."""
        if self._at or self._held:  # in the middle of a chunk; _At.SIZE is 0, which costs less to ask than its name
            return False
        size = len(data) - data.find(b"\r") - 4
        return size > 0 and data[-2:] == b"\r\n" and data.startswith(b"%x\r\n" % size)

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        if self._held:
            data, self._held = self._held + data, b""
        pieces: list[bytes] = []
        position, size = 0, len(data)
        while position < size:
            if self._at is _At.DATA:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._at = _At.DATA_END
                continue
            end = self._line_end(data, position)
            if end is None:
                self._held = data[position:]
                break
            if self._at is _At.LAST_END:
                return b"".join(pieces), data[end:]
            if self._at is _At.SIZE:
                self._left = int(data[position : end - 2], 16)
                self._at = _At.DATA if self._left else _At.LAST_END
            else:
                self._at = _At.SIZE
            position = end
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), None

    def _line_end(self, data: bytes, start: int) -> int | None:
        """Behind the CR LF of the line at `start`: a chunk's size, or nothing at all. None while it is incomplete."""
        digits = 0
        if self._at is _At.SIZE:
            match = _SIZE_LINE.match(data, start)
            if match is None:
                raise MalformedError("a chunk's size is not a hexadecimal number")
            digits = len(match[0])
        rest = data[start + digits : start + digits + 2]
        if rest == b"\r\n":
            return start + digits + 2
        if rest in (b"", b"\r"):
            return None
        what = "only a line end may follow a chunk's size" if digits else "a chunk does not end where its size says"
        raise MalformedError(what if self._at is not _At.LAST_END else "trailers are not taken")

    def ends_at_eof(self) -> bool:
        return False
