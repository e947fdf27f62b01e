"""Connections to engines: the only place of the gateway that opens any, and who is believed to be an engine.

An engine owns its unit's runtime directory and may put anything there: a symlink to the registrar's socket, to D-Bus, to
another engine's. So nothing that it can write says where the gateway connects. An endpoint is one of

    unix:DIR/engine.sock    the socket in the unit's runtime directory DIR
    loopback:PORT:DIR       a port of 127.0.0.1 (`listen: tcp`)
    http://HOST:PORT/BASE   `engine: external`: configuration, and trusted as such

The first two lead to processes of one user only, the owner of DIR, which systemd made below a directory of root's
(RuntimeDirectory=; in a user's instance all of it is the user's). The socket is opened without following links, has to be a
socket of that user, and is connected to by its descriptor (proc(5), /proc/self/fd), so that what was checked is what is used;
the listener has to be of that user as well (unix(7), SO_PEERCRED; for TCP mmd.gateway.listener_owner). All of it happens when a
connection is made, never per request.
"""

import asyncio
import errno
import os
import socket
import ssl
import stat
import struct
from collections.abc import Callable
from typing import Final, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from mmd.errors import MmdError
from mmd.foreign_file import open_directory
from mmd.gateway.listener_owner import ForeignListenerError, check_owner
from mmd.shortage import is_shortage

__all__ = [
    "CONNECT_TIMEOUT_S",
    "EngineAddress",
    "EngineGoneError",
    "EngineUnavailableError",
    "port_endpoint",
    "socket_endpoint",
]

CONNECT_TIMEOUT_S: Final = 5.0

UNKNOWN_ENDPOINT: Final = "unknown:"
"""Of an engine whose port cannot be read at present, for want of descriptors: to connect is an EngineUnavailableError."""

# While a backlog is full (listen(2)): a busy engine accepts within milliseconds, a very busy one within tenths of a second.
_RETRY_FIRST_S: Final = 0.002
_RETRY_MAX_S: Final = 0.1

_CREDENTIALS: Final = struct.Struct("iII")  # struct ucred

_OVERLOADED: Final = "gateway_overloaded"

_GONE: Final = frozenset((errno.ECONNREFUSED, errno.ENOENT, errno.ECONNRESET))
_NOT_A_SOCKET: Final = frozenset((errno.ELOOP, errno.ENOTDIR))
"""What open(2) says of a symlink (O_NOFOLLOW, O_DIRECTORY)."""

P = TypeVar("P", bound=asyncio.BaseProtocol)


# Opened at the same time by one process: meanwhile each takes a descriptor more than when it is open, and a burst of requests
# must not exhaust those that mmd.gateway.places leaves for engines.
_OPENING_MAX: Final = 8

_opening: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]] = WeakKeyDictionary()


def _opening_in(loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return _opening.setdefault(loop, asyncio.Semaphore(_OPENING_MAX))


class EngineGoneError(MmdError):
    """No engine listens at its endpoint: nothing was sent, and a restart may help."""


class EngineUnavailableError(MmdError):
    """No connection, and that is no sign that the engine is dead: its backlog is full, or this process is short of something.

    Whether it is dead is systemd's to say (its watchdog). Nothing was sent."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code
        """For clients: `engine_overloaded`, `gateway_overloaded` or `engine_unreachable`."""


def socket_endpoint(directory: str | os.PathLike[str]) -> str:
    """The endpoint of an engine that listens on the socket in its unit's runtime directory."""
    return f"unix:{os.fspath(directory)}/engine.sock"


def port_endpoint(port: int, directory: str | os.PathLike[str]) -> str:
    """The endpoint of an engine that listens on a port of loopback, as the owner of its unit's runtime directory."""
    return f"loopback:{port}:{os.fspath(directory)}"


class EngineAddress:
    """An endpoint, taken apart."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.host = b"localhost"
        """The Host that the engine is asked for."""
        self.prefix = b""
        """What comes before the path of every request."""
        self._path = self._directory = ""
        self._tls: ssl.SSLContext | None = None
        self._external: tuple[str, int] | None = None
        self._port = 0
        kind, _, rest = endpoint.partition(":")
        if kind == "unix":
            self._directory, _, self._path = rest.rpartition("/")
        elif kind == "loopback":
            port, _, self._directory = rest.partition(":")
            self._port = int(port)
            self.host = b"127.0.0.1:%d" % self._port
        elif endpoint != UNKNOWN_ENDPOINT:
            self._take_url(endpoint)

    def _take_url(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        try:
            port = url.port or (443 if self._tls else 80)
        except ValueError:  # none that there is: nobody will answer there
            port = 0
        self._external = (url.hostname or "localhost", port)
        self.host, self.prefix = url.netloc.rpartition("@")[2].encode(), url.path.rstrip("/").encode()

    async def connect(self, make: Callable[[], P]) -> P:
        """A connection for what `make` makes, within CONNECT_TIMEOUT_S; EngineGoneError, EngineUnavailableError."""
        if self.endpoint == UNKNOWN_ENDPOINT:
            raise EngineUnavailableError("the gateway is short of resources: its report cannot be read", code=_OVERLOADED)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._connect(make)
        except TimeoutError as error:
            message = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            if self._external is not None:
                raise EngineGoneError(message) from error
            raise EngineUnavailableError(f"{message}: its backlog is full", code="engine_overloaded") from error
        except (MmdError, ForeignListenerError) as error:
            raise EngineGoneError(str(error)) from error
        except (OSError, MemoryError) as error:
            if is_shortage(error):
                message = f"the gateway is short of resources: {error.strerror if isinstance(error, OSError) else 'memory'}"
                raise EngineUnavailableError(message, code=_OVERLOADED) from error
            if self._external is not None or (isinstance(error, OSError) and error.errno in _GONE | _NOT_A_SOCKET):
                raise EngineGoneError(str(error)) from error
            raise EngineUnavailableError(str(error), code="engine_unreachable") from error

    async def _connect(self, make: Callable[[], P]) -> P:
        """The event loop makes the socket: one that is handed to uvloop has two owners until its next turn, and if the engine
        closes before that, both close the same number."""
        loop = asyncio.get_running_loop()
        if self._external is not None:
            host, port = self._external
            _, protocol = await loop.create_connection(make, host, port, ssl=self._tls)
            return protocol
        if self._port:
            owner = self._owner()
            opened, protocol = await loop.create_connection(make, "127.0.0.1", self._port)
            check = _check_port
        else:
            opened, protocol, owner = await self._connect_unix(loop, make)
            check = _check_peer
        try:
            check(opened, owner)
        except BaseException:
            opened.abort()
            raise
        return protocol

    def _owner(self) -> int:
        directory, owner = open_directory(self._directory)
        os.close(directory)
        return owner

    async def _connect_unix(self, loop: asyncio.AbstractEventLoop, make: Callable[[], P]) -> tuple[asyncio.Transport, P, int]:
        wait_s = _RETRY_FIRST_S
        while True:
            async with _opening_in(loop):
                found, owner = self._open_socket()
                try:
                    opened, protocol = await loop.create_unix_connection(make, f"/proc/self/fd/{found}")
                except BlockingIOError:  # the backlog is full: a Unix socket does not wait, EAGAIN in connect(2)
                    pass
                else:
                    return opened, protocol, owner
                finally:
                    os.close(found)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _RETRY_MAX_S)

    def _open_socket(self) -> tuple[int, int]:
        """A descriptor (O_PATH) of the engine's socket, and the engine's uid."""
        directory, owner = open_directory(self._directory)
        try:
            found = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            state = os.fstat(found)
            if not stat.S_ISSOCK(state.st_mode):
                raise EngineGoneError(f"{self._path} is no socket")
            if state.st_uid != owner:
                raise EngineGoneError(f"{self._path} belongs to user {state.st_uid}, not to the engine's ({owner})")
        except BaseException:
            os.close(found)
            raise
        return found, owner


def _check_peer(transport: asyncio.Transport, owner: int) -> None:
    """EngineGoneError unless who listens is of user `owner` (SO_PEERCRED: as of listen(2))."""
    if transport.is_closing():
        raise EngineGoneError("it closed the connection at once")
    peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(peer)
    if uid != owner:
        raise EngineGoneError(f"who listens is user {uid}, not the engine's ({owner})")


def _check_port(transport: asyncio.Transport, owner: int) -> None:
    if transport.is_closing():
        raise EngineGoneError("it closed the connection at once")
    check_owner(transport.get_extra_info("sockname"), transport.get_extra_info("peername"), owner)
