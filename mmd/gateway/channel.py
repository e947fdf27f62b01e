"""Messages with file descriptors between two processes of the gateway: unix(7), SOCK_SEQPACKET and SCM_RIGHTS.

A message is a msgspec structure as JSON. Descriptors that go with it are dup'ed into it by the kernel; the sender's are closed
once it has been sent, the receiver's are the receiver's.

A packet holds one message, or a part of one that is too large for it: a part begins with `+` if another one follows, with `=`
if it is the last, which has the descriptors. (JSON begins with `{`.)
"""

import array
import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

__all__ = ["Channel", "connection_of", "encoded", "from_memory", "in_memory", "turn_away"]

_log = logging.getLogger(__name__)

# Of a packet. A socket's buffer, 208 KiB by default, must have room for it and for what the kernel adds.
_PACKET_MAX_BYTES = 65536
_PART_BYTES = 32768

# Of a message. Nothing that is sent is meant to come near: what may be long is in memory files.
_MESSAGE_MAX_BYTES = 16 << 20

# SCM_MAX_FD of the kernel, unix(7).
_FDS_MAX = 253

# The kernel lacks memory, or too many descriptors are on their way: not for ever.
_TRANSIENT = frozenset((errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS))
_RETRY_S = 0.01

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b"
)
_FULL_BODY = (
    b'{"error": {"message": "the gateway has no room for another connection", "type": "server_error", "param": null, '
    b'"code": "too_many_connections"}}'
)


class Channel:
    """One end. `on_message` gets each message with its descriptors, `on_end` is called once when the other end has gone."""

    def __init__(
        self,
        end: socket.socket,
        messages: Any,
        on_message: Callable[[Any, list[int]], None],
        on_end: Callable[[], None],
    ) -> None:
        """`messages`: the union of structures that may come."""
        end.setblocking(False)
        self._socket = end
        self.open = True
        self._decoder = msgspec.json.Decoder(messages)
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._parts: list[bytes] = []
        """Of a message that has not come to its end."""
        self._parts_bytes = 0
        self._loop.add_reader(end.fileno(), self._receive)

    def send(self, message: msgspec.Struct, *fds: int) -> None:
        """Send as soon as there is room; after the other end has gone it goes nowhere."""
        if not self.open:
            _close(fds)
            return
        if len(fds) > _FDS_MAX:
            _close(fds)
            raise ValueError(f"{type(message).__name__}: {len(fds)} descriptors do not go into one message")
        idle = not self._unsent
        data = encoded(message)
        if len(data) <= _PART_BYTES:
            self._unsent.append((data, fds))
        else:
            last = (len(data) - 1) // _PART_BYTES * _PART_BYTES
            for at in range(0, last, _PART_BYTES):
                self._unsent.append((b"+" + data[at : at + _PART_BYTES], ()))
            self._unsent.append((b"=" + data[last:], fds))
        if idle:
            self._flush()

    def send_connection(self, message: msgspec.Struct, connection: int, read: bytes) -> None:
        """Hand over a client's connection by its descriptor, with what was read of it and is still to be answered."""
        try:
            memory = (in_memory(read),) if read else ()
        except OSError as error:  # no descriptor is left
            _log.warning("a connection cannot be handed over: %s", error)
            turn_away(connection)
            return
        self.send(message, connection, *memory)

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                socket.send_fds(self._socket, [data], list(fds))
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError as error:
                if error.errno in _TRANSIENT:
                    self._loop.remove_writer(self._socket.fileno())
                    self._loop.call_later(_RETRY_S, self._flush_again)
                else:
                    self._end()
                return
            self._unsent.popleft()
            _close(fds)
        self._loop.remove_writer(self._socket.fileno())

    def _flush_again(self) -> None:
        if self.open:
            self._flush()

    def _receive(self) -> None:
        while self.open:
            try:
                data, fds = self._take()
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self._end()
                return
            whole = self._whole(data)
            if whole is None:
                continue
            try:
                message = self._decoder.decode(whole)
            except msgspec.MsgspecError as error:  # of another version
                _log.warning("a message from another gateway is not understood: %s", error)
                _close(fds)
            else:
                self._on_message(message, fds)

    def _take(self) -> tuple[bytes, list[int]]:
        found = array.array("i")
        data, ancillary, flags, _ = self._socket.recvmsg(_PACKET_MAX_BYTES, socket.CMSG_SPACE(_FDS_MAX * found.itemsize))
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
        if flags & socket.MSG_CTRUNC:  # the kernel has closed what there was no number for: a client notices
            _close(found)
            found = array.array("i")
            _log.error("descriptors of a message are lost: this process has as many files open as it may (LimitNOFILE=)")
            return b"!", []
        return data, list(found)

    def _whole(self, data: bytes) -> bytes | None:
        """The message that is complete with this packet."""
        mark = data[:1]
        if mark not in (b"+", b"="):
            self._parts, self._parts_bytes = [], 0
            return None if mark == b"!" else data
        self._parts.append(data[1:])
        self._parts_bytes += len(data)
        if self._parts_bytes > _MESSAGE_MAX_BYTES:
            self._parts.clear()
        if mark == b"+":
            return None
        parts, self._parts, self._parts_bytes = self._parts, [], 0
        return b"".join(parts)

    def _end(self) -> None:
        if self.open:
            self.close()
            self._on_end()

    def detach(self) -> socket.socket:
        """Use it no more, and hand its end over as it is: what has not been read stays in it."""
        self._let_go()
        return self._socket

    def close(self) -> None:
        if self.open:
            self._let_go()
            self._socket.close()

    def _let_go(self) -> None:
        self.open = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        for _, fds in self._unsent:
            _close(fds)
        self._unsent.clear()


def encoded(message: msgspec.Struct) -> bytes:
    """As JSON. Text that is none in UTF-8 (half of a surrogate pair, that an engine or a client wrote) becomes `?`."""
    try:
        return msgspec.json.encode(message)
    except UnicodeEncodeError:
        return msgspec.json.encode(_proper(msgspec.to_builtins(message)))


def _proper(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_proper(key): _proper(each) for key, each in value.items()}
    return [_proper(each) for each in value] if isinstance(value, list | tuple) else value


def turn_away(connection: int) -> None:
    """Tell the client of a connection, by its descriptor, which is closed, that nobody has room for it."""
    with suppress(OSError), socket.socket(fileno=connection) as client:
        client.setblocking(False)
        client.send(_FULL % (len(_FULL_BODY), _FULL_BODY))


def in_memory(data: bytes) -> int:
    """A descriptor of a file that holds `data`, see memfd_create(2): a message has room for some kilobytes only."""
    memory = os.memfd_create("mmd-message")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(memory, view) :]
    except OSError:
        os.close(memory)
        raise
    return memory


def from_memory(descriptor: int) -> bytes:
    """What `in_memory` put there; the descriptor is closed."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def connection_of(fds: Sequence[int]) -> tuple[socket.socket, bytes]:
    """The connection that came by `send_connection`, and what was read of it."""
    return socket.socket(fileno=fds[0]), from_memory(fds[1]) if len(fds) > 1 else b""


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
