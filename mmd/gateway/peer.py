"""Who speaks on a Unix socket, as the kernel says: SO_PEERCRED, unix(7)."""

import asyncio
import os
import pwd
import socket
import struct
from typing import NamedTuple

from aiohttp import web

__all__ = ["Peer", "peer_of"]

_CREDENTIALS = struct.Struct("3i")

# A name service (nsswitch.conf(5)) may ask another machine, which may be down.
_NAME_WITHIN_S = 1.0


class Peer(NamedTuple):
    """The process that has connected; it may have ended meanwhile."""

    pid: int
    uid: int

    @property
    def owns_keys(self) -> bool:
        """Whether the file of API keys is its user's: root's, or that of the gateway's own user, whose instance it is."""
        return self.uid in (0, os.geteuid())

    async def words(self) -> str:
        """For the log."""
        try:
            async with asyncio.timeout(_NAME_WITHIN_S):
                name = f" ({(await asyncio.to_thread(pwd.getpwuid, self.uid)).pw_name})"
        except (KeyError, TimeoutError):
            name = ""
        return f"uid {self.uid}{name}, pid {self.pid}"


def peer_of(request: web.Request) -> Peer | None:
    """None: it has gone, or came over TCP."""
    connection = None if request.transport is None else request.transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return Peer(pid, uid)
