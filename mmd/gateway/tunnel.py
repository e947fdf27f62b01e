"""Bytes both ways between a client and an engine, whatever they mean, on asyncio protocols.

Back-pressure: who does not take what it gets is not read from on the other side, so that a write buffer (64 KiB) and one read
(256 KiB) wait here, and the rest stays with the sender. The end of one direction is passed on as such; a connection that broke
breaks the other one as well (a reset).

A tunnel is open (bytes pass) or shut: before both ends are there, and after it was silent for so long that nobody can be said
to use it. One that is shut keeps what was just read, reads no more, and says so.
"""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, cast

from mmd.gateway.relay.slowness import Unread

__all__ = ["RESET", "Patience", "Tunnel"]

RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes a close a reset (socket(7))."""


class Patience:
    """How long a tunnel may be silent and is still in use."""

    def __init__(self, answered_s: float = 60.0, owed_s: float = 600.0) -> None:
        """`answered_s`: when the engine spoke last; `owed_s`: when the client did, for which the engine may be at work."""
        self.answered_s = answered_s
        self.owed_s = owed_s


class _Side(asyncio.Protocol):
    """One of the two connections."""

    __slots__ = ("_full", "_paused", "_tunnel", "ended", "kept", "other", "transport", "unread")

    def __init__(self, tunnel: "Tunnel") -> None:
        self._tunnel = tunnel
        self._full = False
        """The other one does not keep up."""
        self._paused = False
        self.other = self
        self.transport: asyncio.Transport | None = None
        self.kept = b""
        """Read while the tunnel was shut."""
        self.ended = False
        """It says no more."""
        self.unread = Unread()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        if self._tunnel.open:
            self._tunnel.moved(by_client=self is self._tunnel.client)
            self.other.write(data)
        else:
            self.kept += data
            self.regulate()
            self._tunnel.want()

    def eof_received(self) -> bool:
        self.ended = True
        if not self.kept:
            self._tunnel.pass_end(self)
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._tunnel.lost(self, error)

    def pause_writing(self) -> None:
        self.other.hold(full=True)

    def resume_writing(self) -> None:
        self.other.hold(full=False)

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def hold(self, *, full: bool) -> None:
        self._full = full
        self.regulate()

    def regulate(self) -> None:
        pause = self._full or bool(self.kept)
        if pause is self._paused or self.transport is None or self.transport.is_closing():
            return
        self._paused = pause
        if pause:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def end(self, *, broken: bool) -> None:
        """Close: after what was written has gone out, or so that the other notices that something is missing."""
        transport = self.transport
        if transport is None:
            return
        if not broken:
            transport.close()
            return
        connection = transport.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        transport.abort()


class Tunnel:
    def __init__(
        self,
        on_end: Callable[[], None],
        *,
        patience: Patience | None = None,
        on_silence: Callable[[], None] | None = None,
        on_wish: Callable[[], None] | None = None,
    ) -> None:
        """`on_silence`: it was silent for longer than `patience` (None: for ever) and is shut; `on_wish`: somebody speaks, see
        `pass_on`; `on_end`: both connections have ended."""
        self.client, self.engine = _Side(self), _Side(self)
        self.client.other, self.engine.other = self.engine, self.client
        self.open = False
        self._on_end = on_end
        self._patience = patience
        self._on_silence = on_silence
        self._on_wish = on_wish
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._owed = True
        """The client spoke last."""
        self._timer: asyncio.TimerHandle | None = None
        self.over = False
        """Both connections have ended."""

    def pass_on(self) -> None:
        """Open it, and pass on what was kept."""
        if self.over:
            return
        self.open = True
        self._last = self._loop.time()
        if self._patience is not None:
            self._timer = self._loop.call_later(self._patience.answered_s, self._look)
        for side in (self.client, self.engine):
            kept, side.kept = side.kept, b""
            if kept:
                self._owed = side is self.client
                side.other.write(kept)
            if side.ended:
                self.pass_end(side)
            side.regulate()

    def _look(self) -> None:
        assert self._patience is not None
        silent_s = self._loop.time() - self._last
        limit_s = self._patience.owed_s if self._owed else self._patience.answered_s
        if silent_s < limit_s:
            # Soon enough for an answer that comes meanwhile.
            self._timer = self._loop.call_later(min(limit_s - silent_s, self._patience.answered_s), self._look)
            return
        self._timer, self.open = None, False
        if self._on_silence is not None:
            self._on_silence()

    def check(self, now: float, stalled_s: float) -> None:
        """Break it if either side has read nothing of what waits for it for so long."""
        if any(side.unread.stuck_s(side.transport, now) > stalled_s for side in (self.client, self.engine)):
            self.abort()

    @property
    def last_moved(self) -> float:
        """When bytes moved last, of the loop's clock."""
        return self._last

    # What the sides call.

    def moved(self, *, by_client: bool) -> None:
        self._last, self._owed = self._loop.time(), by_client

    def want(self) -> None:
        """Something was said while it is shut."""
        if self._on_wish is not None:
            self._on_wish()

    def pass_end(self, side: _Side) -> None:
        """One direction is over; after both, the connections are."""
        other = side.other
        if other.transport is not None and not other.transport.is_closing():
            other.transport.write_eof()
        if side.ended and other.ended and not (side.kept or other.kept):
            for each in (side, other):
                each.end(broken=False)

    def lost(self, side: _Side, error: Exception | None) -> None:
        finished = side.ended and side.other.ended
        side.other.end(broken=error is not None or not finished)
        if side.other.transport is None and not self.over:
            self.over, self.open = True, False
            if self._timer is not None:
                self._timer.cancel()
            self._on_end()

    def abort(self) -> bool:
        """End both connections so that nobody takes it for a proper end; False: there are none, and nothing will follow."""
        connected = [side for side in (self.client, self.engine) if side.transport is not None]
        for side in connected:
            side.end(broken=True)
        return bool(connected)
