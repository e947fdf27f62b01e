"""The gateway's own application (aiohttp) behind the same interface as an engine: one handler per request, and no socket.

So a connection may carry requests of both kinds in any order, and one piece of code follows the framing of either's answers.
"""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.framing import chunk, last_chunk
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.visitor import UNKNOWN_KEY, Visitor

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["VISITOR", "ApplicationExchange"]

VISITOR: Final = "mmd.visitor"
"""What a handler asks its transport for to learn who asks."""


class _Pipe(asyncio.Transport):
    """The transport that a handler sees: what it writes goes to an exchange, what it asks about is the client's connection."""

    def __init__(self, exchange: "ApplicationExchange", client: "ClientConnection", handler: "RequestHandler") -> None:
        super().__init__()
        self._exchange: ApplicationExchange | None = exchange
        self._client: ClientConnection | None = client
        self._transport = client.transport
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._over = False

    # What the handler calls.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == VISITOR and self._exchange is not None:
            return self._exchange.visitor
        return default if self._transport is None else self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._exchange is not None and data:
            self._exchange.received(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The limits are the client connection's."""

    def get_write_buffer_size(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def is_reading(self) -> bool:
        return not self._closing

    def pause_reading(self) -> None:
        if self._client is not None:
            self._client.hold_body(full=True)

    def resume_reading(self) -> None:
        if self._client is not None:
            self._client.hold_body(full=False)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose)

    # What the exchange calls.

    def hold(self) -> None:
        self._handler.pause_writing()

    def go_on(self) -> None:
        self._handler.resume_writing()

    def release(self, *, in_step: bool) -> None:
        """The client has the answer. The handler may go on to its end, which closes the pipe: it was told `close`."""
        del in_step
        self._let_go()

    def abort(self) -> None:
        """The handler is cancelled."""
        self._let_go()
        self.close()

    def _let_go(self) -> None:
        client, self._client, self._exchange, self._transport = self._client, None, None, None
        if client is not None:
            client.hold_body(full=False)

    def _lose(self) -> None:
        if self._over:
            return
        self._over = True
        exchange = self._exchange
        self._let_go()
        self._handler.connection_lost(None)
        if exchange is not None:
            exchange.ended(None)


class ApplicationExchange(Exchange):
    """A request that the gateway's own application answers."""

    def __init__(
        self, client: "ClientConnection", request: RequestHead, length: int | None, server: Server, visitor: Visitor | None
    ) -> None:
        """`visitor`: whose key it comes with; None where no keys are asked for."""
        super().__init__(client, request, length)
        self.visitor = visitor
        self._scope = None if visitor is None or visitor.key is None else visitor.key.scope
        self._chunks = request.chunked
        self._handler: RequestHandler = server()
        pipe = _Pipe(self, client, self._handler)
        self.upstream = pipe
        self._handler.connection_made(pipe)

    def begin(self) -> None:
        """The head, written anew."""
        request = self.request
        parts = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (request.method, request.target, request.host or b"")]
        parts += [b"%b: %b\r\n" % (name, value) for _, name, value in request.fields]
        if request.websocket:
            parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
        else:
            parts.append(b"Connection: close\r\n")
        if request.chunked:
            parts.append(b"Transfer-Encoding: chunked\r\n")
        elif self.length is not None:
            parts.append(b"Content-Length: %d\r\n" % self.length)
        parts.append(b"\r\n")
        self._handler.data_received(b"".join(parts))

    def judge_again(self, *, required: bool) -> None:
        visitor = self.visitor
        if visitor is None:
            permitted = not required
        else:
            permitted = self._scope is None or (visitor.key is not None and visitor.key.scope is self._scope)
        if not permitted and not self.over:
            self.fail(ApiError(401, UNKNOWN_KEY, code="invalid_api_key"))

    def feed(self, piece: bytes) -> None:
        self._handler.data_received(chunk(piece) if self._chunks else piece)

    def end(self) -> None:
        if self._chunks:
            self._handler.data_received(last_chunk)

    def tunnel(self, data: bytes) -> None:
        self._handler.data_received(data)

    def broken(self, reason: str) -> None:
        self.fail(ApiError(500, f"internal error: {reason}; see journalctl -u mmd-gateway", code="internal_error"))
