"""A client's connection: requests in, one after the other, each with its answer before the next is looked at."""

import asyncio
from collections.abc import Callable
from typing import Final, cast

from mmd.config import Timeouts
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.clients import Whose
from mmd.gateway.relay.exchange import Exchange, error_lines
from mmd.gateway.relay.framing import Chunked, Length
from mmd.gateway.relay.head import MalformedError, RequestHead, RequestParser
from mmd.gateway.relay.host import Host
from mmd.gateway.relay.known import KnownRequests
from mmd.gateway.relay.moving import detached, discard, no_descriptor
from mmd.gateway.relay.slowness import Unread, Upload

__all__ = ["ClientConnection"]

# Bytes that a client may send ahead of the answer under way. More stay in the kernel.
_AHEAD_MAX_BYTES: Final = 64 << 10

# How long a client that still sends may go on doing so after its answer: closing at once would make the kernel answer with a
# reset, which may overtake the answer (RFC 9112, 9.6).
_LINGER_S: Final = 2.0

# When to look again whether the client has read what was written to it.
_FLUSH_S: Final = 0.05

_known: Final = KnownRequests()


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_ahead",
        "_body",
        "_closing",
        "_excess",
        "_fresh",
        "_full",
        "_host",
        "_loop",
        "_parser",
        "_paused",
        "_read_so_far",
        "_reading",
        "_resumed",
        "_since",
        "_tunnel",
        "_unread",
        "close_after",
        "exchange",
        "stalled",
        "transport",
        "whose",
        "write",
    )

    def __init__(
        self, host: Host, loop: asyncio.AbstractEventLoop, *, read: bytes | None = None, chunked: bool | None = None
    ) -> None:
        """`read`: what another process that accepted it has read; `chunked`: how the event stream is framed that answers it."""
        self._host = host
        self._loop = loop
        self._since = loop.time()
        self._parser: RequestParser | None = None
        self._body: Upload | None = None
        """The request's body, while it is being read."""
        self._unread = Unread()
        self.whose = Whose()
        self.exchange: Exchange | None = None
        """The request in hand."""
        self._ahead = b""
        self._read_so_far = read or b""
        """The beginning of a head that is not complete."""
        self._resumed = chunked
        self._fresh = read is None
        self._excess = False
        """Its client has too many, but this one was accepted: it ends with its next answer."""
        self._reading = False
        self.stalled = False
        """It does not read what we send."""
        self._full = False
        """The upstream does not keep up with its body."""
        self._paused = False
        self._closing = False
        self._tunnel = False
        self.close_after = False
        """The connection ends with the present answer."""
        self.transport: asyncio.Transport | None = None
        self.write: Callable[[bytes], None] = discard

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class
        self.write = self.transport.write
        self._excess = not self._host.came(self, self._fresh)
        if self._excess and self._fresh:
            message = "this client has as many connections as it may (gateway.connections_per_client)"
            self._refuse(ApiError(429, message, code="too_many_connections", retry_after_s=1))
        elif self._read_so_far:
            data, self._read_so_far = self._read_so_far, b""
            self._read(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        self.write = discard
        self._host.went(self)
        self._gone()

    def eof_received(self) -> None:
        """A client that closes its side has gone: hardly any half-close, and those that leave do just this."""
        self._gone()

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            if not (self._parser or self._ahead or self.stalled or self._closing):
                found = _known.find(data)
                if found is not None:
                    request, length, end = found
                    if length and len(data) - end == length:  # a whole request with a head that was seen before: most are
                        self.exchange = exchange = self._host.exchange(self, request, length)
                        if exchange is None:
                            self._pass_on(data)
                            return
                        self.close_after = not request.keep_alive
                        exchange.whole(data[end:])
                        return
            self._read(data)
        elif self._tunnel:
            self.exchange.tunnel(data)
        elif self._body is not None:
            self._read(data)
        else:
            self._ahead += data
            self._regulate()

    def pause_writing(self) -> None:
        self.stalled = True
        self._since = self._loop.time()
        if self.exchange is not None:
            self.exchange.hold()

    def resume_writing(self) -> None:
        self.stalled = False
        if self.exchange is not None:
            self.exchange.go_on()
        else:
            self._read_ahead()

    # Reading.

    def _read(self, data: bytes) -> None:
        self._reading = True
        try:
            while data and not self._closing:
                if self._body is not None:
                    data = self._read_body(self._body, data)
                elif self.exchange is not None or self.stalled:
                    self._ahead = data
                    self._regulate()
                    return
                else:
                    data = self._read_head(data)
        except MalformedError as error:
            self._refuse(ApiError(error.status, f"this is not HTTP as it is spoken here: {error}", code="bad_http"))
        finally:
            self._reading = False

    def _read_head(self, data: bytes) -> bytes:
        parser = self._parser
        if parser is None:
            self._since = self._loop.time()
            found = _known.find(data)
            if found is not None:
                head, length, end = found
                return self._begin(head, length, data, end)
            parser = self._parser = RequestParser(self._host.gateway.max_head_bytes)
            end_or_not = parser.parse(data)
            if end_or_not is not None:
                _known.learn(parser.head, data[:end_or_not])
        else:
            end_or_not = parser.parse(data)
        if end_or_not is None:
            self._read_so_far += data
            return b""
        before, self._parser, self._read_so_far = self._read_so_far, None, b""
        return self._begin(parser.head, parser.head.length, before + data, len(before) + end_or_not)

    def _begin(self, request: RequestHead, length: int | None, data: bytes, end: int) -> bytes:
        """A request has begun; `data` begins with its head, which ends at `end`. What of it remains to be read."""
        exchange = self.exchange = self._host.exchange(self, request, length)
        if exchange is None:
            self._pass_on(data)
            return b""
        data = data[end:]
        self.close_after = not request.keep_alive
        if self._resumed is not None:
            chunked, self._resumed = self._resumed, None
            exchange.resume(chunked=chunked)
        if length and len(data) >= length:
            self._ahead = data[length:]
            exchange.whole(data[:length])
            return self._take_ahead()
        if request.chunked or length:
            self._body = Upload(Length(length) if length else Chunked(), self._since)
        exchange.begin()
        if exchange.over:
            return data
        if self._body is None:
            exchange.end()
        elif request.continues and not data:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return data

    def _read_body(self, body: Upload, data: bytes) -> bytes:
        exchange = self.exchange
        assert exchange is not None
        piece, rest = body.feed(data)
        if piece:
            exchange.feed(piece)
            if exchange.over:
                return b""
        if rest is None:
            self._since = self._loop.time()
            return b""
        self._body, self._ahead = None, rest
        exchange.end()
        return self._take_ahead()

    def _take_ahead(self) -> bytes:
        """What followed a request, unless the connection has moved on with it."""
        data, self._ahead = self._ahead, b""
        return b"" if self._closing else data

    def _read_ahead(self) -> None:
        if self._reading:
            return  # `_read` goes on by itself: thousands of requests that are answered at once must not be as many calls deep
        data, self._ahead = self._ahead, b""
        self._regulate()
        if data:
            self._read(data)

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request; nothing after it can be trusted."""
        self.close_after = True
        if self.exchange is not None:
            self.exchange.fail(error)
            return
        lines, framing, content = error_lines(error)
        self.write(self.head(lines, framing) + content)
        self._close(linger=True)

    # What exchanges call.

    def head(self, lines: bytes, framing: bytes) -> bytes:
        """The head of an answer: its lines, and what concerns this connection and the page that asks."""
        exchange = self.exchange
        mark = b"" if exchange is None else exchange.id_line
        if exchange is not None and exchange.request.origin:
            lines += self._host.cors_lines(exchange.request.origin)
        if self.close_after or self._excess or self._host.leaving or self._body is not None:
            self.close_after = True
            return b"%b%b%bConnection: close\r\n\r\n" % (lines, mark, framing)
        if exchange is not None and exchange.request.version == "1.0":
            return b"%b%b%bConnection: keep-alive\r\n\r\n" % (lines, mark, framing)
        return b"%b%b%b\r\n" % (lines, mark, framing)

    def answered(self, exchange: Exchange) -> None:
        """The exchange is over."""
        if self.exchange is not exchange:
            return
        self.exchange = None
        self._since = self._loop.time()
        if self.whose.forwarded:
            self._host.answered(self)
        if self.transport is None or self._closing:
            return
        if self.close_after or self._body is not None:
            self._close(linger=self._body is not None or bool(self._ahead))
        elif self._host.heir is not None:
            self.leave()
        elif self._ahead and not self.stalled:
            self._read_ahead()

    def leave(self) -> bool:
        """Move to the gateway that comes after this one, with the request that waits, if there is one; False: not now."""
        heir, transport, exchange = self._host.heir, self.transport, self.exchange
        if heir is None:
            return False
        request = b"" if exchange is None else exchange.unsent()
        if transport is None or transport.is_closing() or self._closing or self._body or request is None:
            return False
        if transport.get_write_buffer_size():
            self._loop.call_later(_FLUSH_S, self.leave)
            return True
        data, begun = request + self._read_so_far + self._ahead, None if exchange is None else exchange.begun
        connection = detached(transport)
        if connection < 0:
            return False
        self._closing = True
        heir(connection, data, begun, exchange is not None)
        if exchange is not None:
            self.exchange = None
            exchange.withdraw()
        return True

    def _pass_on(self, read: bytes) -> None:
        """Move to another process, which is to answer what `read` begins with, once the answers before it have gone out."""
        transport = self.transport
        self._closing = True
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size():
            self._full = True
            self._regulate()
            self._loop.call_later(_FLUSH_S, self._pass_on, read)
            return
        connection = detached(transport)
        if connection < 0:
            self._refuse(no_descriptor())
        else:
            self._host.pass_on(connection, read, self._resumed)

    def switched(self) -> None:
        """After a 101: bytes go to the exchange as they come."""
        self._tunnel = True
        if self._ahead and self.exchange is not None:
            data, self._ahead = self._ahead, b""
            self.exchange.tunnel(data)

    def hold_body(self, *, full: bool) -> None:
        """Whether the upstream has enough of the request's body for the moment."""
        if self._body is not None:
            self._body.hold(self._loop.time(), full=full)
        self._full = full
        self._regulate()

    def abort(self) -> None:
        """End the connection so that nobody takes the answer for complete."""
        self._closing = True
        if self.transport is not None:
            self.transport.abort()

    # The rest.

    @property
    def idle_since(self) -> float | None:
        """Since when it has no request in hand, or the beginning of one; None: it has one."""
        return None if self.exchange is not None else self._since

    def _regulate(self) -> None:
        pause = self._full or len(self._ahead) > _AHEAD_MAX_BYTES
        if pause is self._paused or self.transport is None or self.transport.is_closing():
            return
        self._paused = pause
        if pause:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _gone(self) -> None:
        self._closing = True
        exchange = self.exchange
        if exchange is not None:
            exchange.lost()

    def _close(self, *, linger: bool) -> None:
        self._closing = True
        self._parser, self._body, self._ahead = None, None, b""
        if self.transport is None:
            return
        if linger:
            self._full = False
            self._regulate()
            if not self.transport.is_closing():
                self.transport.write_eof()
            self._loop.call_later(_LINGER_S, self.close)
        else:
            self.transport.close()

    def close(self) -> None:
        """End an idle connection."""
        self._closing = True
        if self.transport is not None:
            self.transport.close()

    def check(self, now: float, allowed: Timeouts) -> None:
        """End the connection if the client has been silent for too long. What waits for an answer waits."""
        silent_s = now - self._since
        if (self.stalled and silent_s > allowed.stalled_s) or self._unread.stuck_s(self.transport, now) > allowed.stalled_s:
            self.abort()
        if self._closing or self._tunnel or self._full or self._ahead:
            return
        if self._parser is not None or self._body is not None:
            if silent_s > allowed.request_s or (self._body is not None and self._body.late(now, allowed)):
                self._refuse(ApiError(408, "the request did not come in time", code="request_timeout"))
        elif self.exchange is None and silent_s > allowed.idle_s:
            self.close()
