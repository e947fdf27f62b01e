"""Listening sockets that systemd passes on start: sd_listen_fds_with_names(3)."""

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from socket import AddressFamily
from typing import Final

from mmd.errors import MmdError

__all__ = ["ListenSocket", "listen_sockets"]

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass(frozen=True, slots=True)
class ListenSocket:
    """One inherited socket. A name (FileDescriptorName=) repeats when its socket unit listens on several addresses."""

    name: str
    socket: socket.socket

    @property
    def family(self) -> AddressFamily:
        return AddressFamily(self.socket.family)


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> tuple[ListenSocket, ...]:
    """The sockets passed to this very process, in systemd's order; none when there are none or they were meant for another.

    Call it once: the variables are removed, so that children do not take the sockets for theirs, and the descriptors are not
    inherited either. MmdError when the variables contradict each other or a descriptor is no listening socket.
    """
    pid, count, names = (environ.pop(variable, None) for variable in _VARIABLES)
    if pid is None or count is None or pid != str(os.getpid()):
        return ()
    if not count.isdecimal():
        raise MmdError(f"LISTEN_FDS={count} is not a number of descriptors")
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        _check(fd)
    fd_names = ["unknown"] * len(fds) if names is None else names.split(":")
    if len(fd_names) != len(fds):
        raise MmdError(f"LISTEN_FDNAMES={names} names {len(fd_names)} descriptors, LISTEN_FDS={count} passes {count}")
    return tuple(ListenSocket(name, socket.socket(fileno=fd)) for name, fd in zip(fd_names, fds, strict=True))


def _check(fd: int) -> None:
    try:
        os.set_inheritable(fd, False)
        with socket.socket(fileno=os.dup(fd)) as copy:
            listening = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise MmdError(f"inherited descriptor {fd} is no socket: {error.strerror}") from error
    if not listening:
        raise MmdError(f"inherited socket {fd} does not listen", hint="the socket unit must be a stream socket with Accept=no")
