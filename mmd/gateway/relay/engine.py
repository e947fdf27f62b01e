"""Connections to engines: kept warm per endpoint, the one used last first, each for one exchange at a time."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from mmd.gateway.engine_socket import EngineAddress
from mmd.gateway.relay.exchange import Exchange

__all__ = ["EngineConnection", "EngineConnections"]

# uvicorn closes an idle connection after 5 s (engines.md); ours must be the first to let go, or a request meets a dead one.
_KEEPALIVE_S: Final = 4.0


class EngineConnection(asyncio.Protocol):
    """A connection to an engine: with an exchange, or idle in its pool."""

    __slots__ = ("_held", "_pool", "_transport", "exchange", "idle_since", "reused", "write")

    def __init__(self, pool: "EngineConnections") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._held = False
        self.exchange: Exchange | None = None
        self.reused = False
        """Whether an exchange went over it before: then it may have died unnoticed."""
        self.idle_since = 0.0
        self.write: Callable[[bytes], None]

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self.write = self._transport.write

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            self.abort()  # it speaks out of turn: whatever this answers, it is no request of ours
        else:
            exchange.received(data)

    def eof_received(self) -> None:
        self._pool.gone(self)
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.gone(self)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.ended(error)

    def pause_writing(self) -> None:
        """It does not keep up with what its client sends: only a tunnel sends that much after the request."""
        if self.exchange is not None:
            self.exchange.client.hold_body(full=True)

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.client.hold_body(full=False)

    def hold(self) -> None:
        if not self._held and self.alive:
            self._held = True
            assert self._transport is not None
            self._transport.pause_reading()

    def go_on(self) -> None:
        if self._held and self.alive:
            self._held = False
            assert self._transport is not None
            self._transport.resume_reading()

    def release(self, *, in_step: bool) -> None:
        """Back into the pool, if it may serve again."""
        self.exchange = None
        if in_step and self._transport is not None and not self._transport.is_closing():
            if self._held:
                self.go_on()
            self.reused = True
            self._pool.put(self)
        else:
            self.abort()

    def abort(self) -> None:
        self.exchange = None
        self._pool.gone(self)
        if self._transport is not None:
            self._transport.abort()


class EngineConnections:
    """All connections to one endpoint, see mmd.gateway.engine_socket."""

    def __init__(self, endpoint: str) -> None:
        self._address = EngineAddress(endpoint)
        self.host = self._address.host
        self.prefix = self._address.prefix
        """What comes before the path of every request."""
        self._loop = asyncio.get_running_loop()
        self._idle: list[EngineConnection] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self) -> EngineConnection | None:
        """A warm connection, if there is one: `gone` has taken out those that are closed, `_sweep` those too old."""
        return self._idle.pop() if self._idle else None

    async def open(self) -> EngineConnection:
        """A fresh connection; EngineGoneError, EngineUnavailableError."""
        return await self._address.connect(self._make)

    def _make(self) -> EngineConnection:
        return EngineConnection(self)

    def put(self, connection: EngineConnection) -> None:
        if self._closed:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_KEEPALIVE_S, self._sweep)

    def gone(self, connection: EngineConnection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close those that have been idle for too long; they lie at the bottom."""
        self._sweeper = None
        oldest = self._loop.time() - _KEEPALIVE_S
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle[0].abort()
        if self._idle:
            self._sweeper = self._loop.call_at(self._idle[0].idle_since + _KEEPALIVE_S, self._sweep)

    def close(self) -> None:
        """Close the idle ones, and the others when their exchange is over."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self._idle):
            connection.abort()
