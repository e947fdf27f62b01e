"""Who is at the other end of a Unix socket, for the helpers that systemd starts for a connection of the gateway.

The mode of their sockets says who may connect; this is asked of the kernel besides (SO_PEERCRED, unix(7)), since a helper has
rights that the gateway has not.
"""

import os
import pwd
import socket
import struct
from typing import Final, NamedTuple

__all__ = ["Peer", "peer_of"]

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
