"""Messages with file descriptors between two processes of the gateway: unix(7), SOCK_SEQPACKET and SCM_RIGHTS.

A message is a msgspec structure as JSON. Descriptors that go with it are dup'ed into it by the kernel; the sender's are closed
once it has been sent, the receiver's are the receiver's.
"""

import array
import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

__all__ = ["Channel", "connection_of", "from_memory", "in_memory"]

_log = logging.getLogger(__name__)

_MESSAGE_MAX_BYTES = 65536
_FDS_MAX = 64


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
        self._loop.add_reader(end.fileno(), self._receive)

    def send(self, message: msgspec.Struct, *fds: int) -> None:
        """Send as soon as there is room; after the other end has gone it goes nowhere."""
        if not self.open:
            _close(fds)
            return
        self._unsent.append((msgspec.json.encode(message), fds))
        if len(self._unsent) == 1:
            self._flush()

    def send_connection(self, message: msgspec.Struct, connection: int, read: bytes) -> None:
        """Hand over a client's connection by its descriptor, with what was read of it and is still to be answered."""
        self.send(message, connection, *((in_memory(read),) if read else ()))

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                socket.send_fds(self._socket, [data], list(fds))
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._flush)
                return
            except OSError:
                self._end()
                return
            self._unsent.popleft()
            _close(fds)
        self._loop.remove_writer(self._socket.fileno())

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
            try:
                message = self._decoder.decode(data)
            except msgspec.MsgspecError as error:  # of another version
                _log.warning("a message from another gateway is not understood: %s", error)
                _close(fds)
            else:
                self._on_message(message, fds)

    def _take(self) -> tuple[bytes, list[int]]:
        found = array.array("i")
        data, ancillary, _, _ = self._socket.recvmsg(_MESSAGE_MAX_BYTES, socket.CMSG_SPACE(_FDS_MAX * found.itemsize))
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(payload[: len(payload) - len(payload) % found.itemsize])
        return data, list(found)

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


def in_memory(data: bytes) -> int:
    """A descriptor of a file that holds `data`, see memfd_create(2): a message has room for some kilobytes only."""
    memory = os.memfd_create("mmd-message")
    view = memoryview(data)
    while view:
        view = view[os.write(memory, view) :]
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
