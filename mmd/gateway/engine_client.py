"""HTTP to the engines: calls of their control API, and the relay's connections, by endpoint.

A control call is one request on a connection of its own (mmd.gateway.engine_socket). An engine is not trusted with more than a
short answer: redirects are no answer, a body has 64 KiB at most, and one deadline covers connect, head and body.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Final, cast

from mmd.engines.base import HttpCall
from mmd.errors import MmdError
from mmd.gateway.engine_socket import EngineAddress, EngineGoneError, EngineUnavailableError
from mmd.gateway.relay.engine import EngineConnections
from mmd.gateway.relay.framing import Body, Chunked, Length, ToTheEnd
from mmd.gateway.relay.head import MalformedError, ResponseParser

__all__ = ["EngineClient", "EngineError", "EnginePool"]

_BODY_MAX_BYTES: Final = 64 << 10
_INTERIM_MAX: Final = 8
"""1xx answers before the answer (RFC 9110, 15.2); we ask for none."""
_TEXT_MAX: Final = 200


class EngineError(MmdError):
    """An engine's control API failed or did not answer in time."""


class _Answer(asyncio.Protocol):
    """Reads one answer, as strictly as the relay does; `done` gets its status and body, or MalformedError, EOFError."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._parser = ResponseParser()
        self._status = 0
        self._interim = 0
        self._body: Body | None = None
        self._content = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            return
        try:
            self._take(data)
        except MalformedError as error:
            self._fail(error)

    def _take(self, data: bytes) -> None:
        while self._body is None:
            end = self._parser.parse(data)
            if end is None:
                return
            head, data = self._parser.head, data[end:]
            if head.status < 200:
                self._interim += 1
                if head.status == 101 or self._interim > _INTERIM_MAX:
                    raise MalformedError(f"{head.status} without having been asked")
                self._parser = ResponseParser()
                if not data:
                    return
                continue
            self._status = head.status
            if head.bodiless:
                self._body = Length(0)
            elif head.length is not None:
                self._body = Length(head.length)
            else:
                self._body = Chunked() if head.chunked else ToTheEnd()
        piece, rest = self._body.feed(data)
        self._content += piece
        if len(self._content) > _BODY_MAX_BYTES:
            raise MalformedError(f"the answer is larger than {_BODY_MAX_BYTES >> 10} KiB")
        if rest is not None:
            self._succeed()

    def eof_received(self) -> None:
        if self._body is not None and self._body.ends_at_eof():
            self._succeed()
        else:
            self._fail(EOFError("the connection ended before the answer did"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or EOFError("the connection ended before the answer did"))

    def _succeed(self) -> None:
        if not self.done.done():
            self.done.set_result((self._status, self._content))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # who asked may have been cancelled
        self.close()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class EngineClient:
    """The control API at one endpoint."""

    def __init__(self, endpoint: str) -> None:
        self._address = EngineAddress(endpoint)

    async def call(self, call: HttpCall) -> Mapping[str, object]:
        """Carry out a control call; EngineError for anything but a 200 in time. {} when it says no JSON object."""
        asked = f"{call.method} {call.path}"
        try:
            async with asyncio.timeout(call.timeout_s):
                status, content = await self._exchange(call)
        except TimeoutError as error:
            raise EngineError(f"{asked} took longer than {call.timeout_s:g} s") from error
        except (EngineGoneError, EngineUnavailableError, MalformedError, EOFError, OSError) as error:
            raise EngineError(f"{asked} failed: {error}") from error
        if status != 200:
            raise EngineError(f"{asked} answered {status}: {content[: 4 * _TEXT_MAX].decode('utf-8', 'replace')[:_TEXT_MAX]!r}")
        try:
            found = json.loads(content) if content else {}
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    async def _exchange(self, call: HttpCall) -> tuple[int, bytes]:
        body = b"" if call.body is None else json.dumps(call.body).encode()
        kind = b"Content-Type: application/json\r\n" if body else b""
        target = self._address.prefix + call.path.encode()
        head = b"%b %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n%bContent-Length: %d\r\n\r\n" % (
            call.method.encode(),
            target,
            self._address.host,
            kind,
            len(body),
        )
        answer = await self._address.connect(_Answer)
        try:
            assert answer.transport is not None
            answer.transport.write(head + body)
            return await answer.done
        finally:
            answer.close()


class EnginePool:
    """Everything that is open to the endpoints in use."""

    def __init__(self) -> None:
        self._connections: dict[str, EngineConnections] = {}

    def client(self, endpoint: str) -> EngineClient:
        return EngineClient(endpoint)

    def connections(self, endpoint: str) -> EngineConnections:
        """The relay's."""
        connections = self._connections.get(endpoint)
        if connections is None:
            connections = self._connections[endpoint] = EngineConnections(endpoint)
        return connections

    async def forget(self, endpoint: str) -> None:
        """Close the idle connections to an endpoint whose engine is gone."""
        connections = self._connections.pop(endpoint, None)
        if connections is not None:
            connections.close()

    async def close(self) -> None:
        for endpoint in tuple(self._connections):
            await self.forget(endpoint)
