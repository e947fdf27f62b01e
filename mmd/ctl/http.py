"""As much of HTTP/1.1 (RFC 9112) as the admin API needs, over a Unix socket, one request per connection.

http.client does the same, but it brings ssl and email along: importing it takes longer than the rest of `mmdctl status`.
"""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["ProtocolError", "Response", "request"]

_LINE_LIMIT = 64 << 10
"""Longest header line that is read, in bytes."""
_HEADERS_LIMIT = 100
_CONNECT_TIMEOUT_S = 10.0


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1, or stopped in the middle of an answer."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose head has come and whose body is still to be read."""

    status: int
    reason: str
    _stream: BinaryIO
    _length: int | None
    """Content-Length in bytes; None: the body is chunked."""

    def read(self) -> bytes:
        return b"".join(self._pieces())

    def lines(self) -> Iterator[bytes]:
        """The body's lines, each as soon as it is complete."""
        pending = b""
        for piece in self._pieces():
            *complete, pending = (pending + piece).split(b"\n")
            yield from complete
        if pending:
            yield pending

    def _pieces(self) -> Iterator[bytes]:
        """The body, chunk by chunk (RFC 9112, section 7.1); trailers are left unread, the connection ends here."""
        if self._length is not None:
            yield _exactly(self._stream, self._length)
            return
        while size := _hexadecimal(_line(self._stream).partition(";")[0]):
            yield _exactly(self._stream, size)
            _line(self._stream)


@contextmanager
def request(
    path: Path, method: str, target: str, *, headers: Mapping[str, str], body: bytes, timeout_s: float | None
) -> Iterator[Response]:
    """The answer to one request; `timeout_s` bounds each read of it. OSError and ProtocolError when there is none."""
    head = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in headers.items()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        connection.connect(str(path))
        connection.settimeout(timeout_s)
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        with connection.makefile("rb") as stream:
            yield _response(stream)


def _response(stream: BinaryIO) -> Response:
    version, _, rest = _line(stream).partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or not status.isdecimal():
        raise ProtocolError("not an answer in HTTP/1.1")
    fields: dict[str, str] = {}
    while line := _line(stream):
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
        if len(fields) > _HEADERS_LIMIT:
            raise ProtocolError("too many header fields")
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return Response(int(status), reason, stream, None)
    length = fields.get("content-length", "")
    if not length.isdecimal():
        raise ProtocolError("an answer without a length")
    return Response(int(status), reason, stream, int(length))


def _line(stream: BinaryIO) -> str:
    line = stream.readline(_LINE_LIMIT)
    if not line.endswith(b"\n"):
        raise ProtocolError("the connection was closed" if len(line) < _LINE_LIMIT else "a header line is too long")
    return line.decode("latin-1").rstrip("\r\n")


def _exactly(stream: BinaryIO, size_bytes: int) -> bytes:
    data = stream.read(size_bytes)
    if len(data) < size_bytes:
        raise ProtocolError("the connection was closed")
    return data


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise ProtocolError("an answer with a broken chunk") from None
