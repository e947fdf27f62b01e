"""What the helpers share that systemd starts for a connection of the gateway: who has connected, and the line that it sends.

The mode of their sockets says who may connect; this is asked of the kernel besides (SO_PEERCRED, unix(7)), since a helper has
rights that the gateway has not.
"""

import os
import pwd
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["Peer", "peer_of", "read_line", "serve_gateway"]

_RECEIVE_BYTES: Final = 65536

_UCRED: Final = struct.Struct("3i")

_GATEWAY: Final = "mmd"
"""The gateway's user; root may do as it likes anyway."""


class Peer(NamedTuple):
    """The process that has connected."""

    pid: int
    uid: int

    @property
    def is_gateway(self) -> bool:
        """Whether it is the gateway of the system instance, or root."""
        try:
            return self.uid == 0 or pwd.getpwuid(self.uid).pw_name == _GATEWAY
        except KeyError:
            return False

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


def peer_of(connection: socket.socket) -> Peer:
    """Who has connected; OSError when it is no Unix socket."""
    if connection.family is not socket.AF_UNIX:
        raise OSError(f"descriptor {connection.fileno()} of {os.getpid()} is no Unix socket")
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


def serve_gateway(serve: Callable[[socket.socket, Peer], int]) -> int:
    """Serve the connection on standard input, which systemd has accepted (Accept=yes, systemd.socket(5)), for the gateway or
    root; the exit status."""
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        peer = peer_of(connection)
        if not peer.is_gateway:
            print(f"refused: {peer} is not the gateway", file=sys.stderr)
            return 1
        return serve(connection, peer)


def read_line(connection: socket.socket, *, most_bytes: int, limit_s: float) -> bytes | None:
    """A request of one line, without its end; None when it does not come in time, breaks off, or is too long."""
    line, deadline_s = b"", time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([connection], [], [], max(0.0, deadline_s - time.monotonic()))
        try:
            piece = connection.recv(_RECEIVE_BYTES) if ready else b""
        except OSError:
            piece = b""
        line += piece
        if not piece or len(line) > most_bytes + 1:
            return None
    return line[:-1]
