"""Inference requests: routed by the model in the body, each for itself, whatever its connection asked for before.

A request whose model is ready and for which a connection is warm goes to the engine in the call stack that received it. All
others get a task that waits for admission and connects.
"""

import asyncio
import logging
import re
from typing import TYPE_CHECKING

from mmd.config import EngineKind, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.access import Access
from mmd.gateway.relay.counters import USAGE_TAIL_BYTES, Counters
from mmd.gateway.relay.engine import EngineConnection, EngineConnections, EngineGoneError
from mmd.gateway.relay.exchange import Exchange, date_line
from mmd.gateway.relay.framing import chunk, last_chunk
from mmd.gateway.relay.gate import Gate, Place
from mmd.gateway.relay.head import RequestHead, ResponseHead, head_lines
from mmd.gateway.relay.routing import Route
from mmd.gateway.relay.visitor import Visitor
from mmd.names import UnitName
from mmd.quantity import format_size

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["Inference", "InferenceExchange"]

_log = logging.getLogger(__name__)

# Beyond this, head and body are not copied together for the sake of one write.
_JOIN_MAX_BYTES = 64 << 10

# Of an error that comes after a stream has begun: it becomes an event.
_ERROR_MAX_BYTES = 64 << 10

# Methods whose requests have a body as a rule: one that has none says so (RFC 9110, 8.6).
_WITH_BODY = frozenset((b"POST", b"PUT", b"PATCH"))

_EVENTS = b"text/event-stream"
_SHORT_BYTES = 64

# As OpenAI and vLLM make them, at the beginning of an answer to /v1/responses, or of its first event.
_ANSWER_ID = re.compile(rb'"id"\s*:\s*"(resp_[^"\\]{1,120})"')
_ID_WITHIN_BYTES = 16 << 10


class Inference:
    """What all inference requests share."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.access = Access()
        self.counters: dict[str, Counters] = {}
        """By model name."""
        self.loop = asyncio.get_running_loop()

    def counters_of(self, model: str) -> Counters:
        counters = self.counters.get(model)
        if counters is None:
            counters = self.counters[model] = Counters()
        return counters


class InferenceExchange(Exchange):
    """One request for a model."""

    def __init__(
        self,
        client: "ClientConnection",
        request: RequestHead,
        length: int | None,
        shared: Inference,
        route: Route,
        visitor: Visitor | None,
    ) -> None:
        """`visitor`: whose key it comes with; None where no keys are asked for."""
        super().__init__(client, request, length)
        self._shared = shared
        self._route = route
        self._visitor = visitor
        self._entered: Visitor | None = None
        """Where it is counted."""
        self.counted = False
        """The gateway before this one has counted it against the limits of its key."""
        self._pieces: list[bytes] | None = None
        self._body_size = 0
        self._model: Model | None = None
        self._stream = False
        self._target = b""
        self._body_in = b""
        """As the client sent it."""
        self._request = b""
        """The body as the engine gets it."""
        self._begun = 0.0
        self._place: Place | None = None
        self._task: asyncio.Task[None] | None = None
        self._connections: EngineConnections | None = None
        self._retried = False
        self._events = False
        """The client gets an event stream, in which an error can be told at any time."""
        self._error: bytearray | None = None
        """The engine's error, while it is collected to become an event."""
        self._beginning: bytes | None = None
        """Of an answer that the engine keeps, until its id was found."""
        self._sent = 0
        self._before = b""
        self._tail = b""

    # The request.

    def begin(self) -> None:
        if self.request.method not in self._route.methods:
            path = self.request.path.decode()
            message = f"{path} does not take {self.request.method.decode()}"
            self.fail(ApiError(405, message, code="method_not_allowed"))
        elif self.length and self.length > self._limit():
            self.fail(self._too_large())

    def _limit(self) -> int:
        return self._shared.gate.config.gateway.max_body_bytes

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {format_size(self._limit())} (gateway.max_body)"
        return ApiError(413, message, code="body_too_large")

    def feed(self, piece: bytes) -> None:
        size = self._body_size = self._body_size + len(piece)
        if self._pieces is None:
            self._pieces = [piece]
        else:
            self._pieces.append(piece)
        if size > self._limit():
            self.fail(self._too_large())

    def end(self) -> None:
        body, self._pieces = b"".join(self._pieces or ()), None
        self.whole(body)

    def whole(self, body: bytes) -> None:
        """Forward: at once where possible, else in a task."""
        gate = self._shared.gate
        config = gate.config
        if self.request.method not in self._route.methods or len(body) > config.gateway.max_body_bytes:
            self.begin()
            return
        try:
            aim = self._route.aim(self.request, body, config, gate.kept())
        except ApiError as error:
            self.fail(error if self._visitor is None else self._visitor.veil(error))
            return
        model, self._stream, self._request, self._target, name = aim
        if self._visitor is not None:
            refusal = self._visitor.enter(model, name, counted=self.counted)
            if refusal is not None:
                self.fail(refusal)
                return
            self._entered = self._visitor
        self._model, self._body_in = model, body
        if self._route.answers_are_kept:
            self._beginning = b""
        self._begun = self._shared.loop.time()
        if self.client.leave():
            return
        if model.engine is EngineKind.EXTERNAL:
            endpoint = model.endpoint
        else:
            self._place = place = gate.request(model)
            unit = place.unit
            endpoint = gate.endpoint(unit) if unit is not None else None
        if endpoint is not None:
            self._connections = connections = gate.connections(endpoint)
            connection = connections.take()
            if connection is not None:
                self._send(connections, connection)
                return
        self._spawn(again=False)

    def resume(self, *, chunked: bool) -> None:
        self.started = self._events = True
        self.status, self._chunked = 200, chunked

    def unsent(self) -> bytes | None:
        waiting = self.upstream is None and (self._place is None or self._place.waiting)
        if self._model is None or self.over or not waiting or self.request.websocket:
            return None
        return self.request.written(len(self._body_in)) + self._body_in

    def withdraw(self) -> None:
        self._model = None  # its counters are the other's
        super().withdraw()

    def _send(self, connections: EngineConnections, connection: EngineConnection) -> None:
        request, body = self.request, self._request
        head = b"%b %b%b HTTP/1.1\r\nHost: %b\r\n%b%b\r\n" % (
            request.method,
            connections.prefix,
            self._target,
            connections.host,
            request.engine_lines,
            b"Content-Length: %d\r\n" % len(body) if body or self.length is not None else self._unframed(),
        )
        self.upstream = connection
        connection.exchange = self
        if self.client.stalled:
            connection.hold()
        if len(body) <= _JOIN_MAX_BYTES:
            connection.write(head + body)
        else:
            connection.write(head)
            connection.write(body)

    def _unframed(self) -> bytes:
        """What a request without a body says of that."""
        if self.request.websocket:
            return b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        return b"Content-Length: 0\r\n" if self.request.method in _WITH_BODY else b""

    def tunnel(self, data: bytes) -> None:
        connection = self.upstream
        if isinstance(connection, EngineConnection):
            connection.write(data)

    # Waiting, in a task.

    def _spawn(self, *, again: bool) -> None:
        self._task = self._shared.loop.create_task(self._guard(again=again))

    async def _guard(self, *, again: bool) -> None:
        """The boundary of the task: a failure is answered."""
        try:
            await (self._reconnect() if again else self._pursue())
        except ApiError as error:
            self.fail(error)
        except Exception:
            _log.exception("a request for %s failed", self._model.name if self._model else "no model")
            self.fail(ApiError(500, "internal error; see journalctl -u mmd-gateway", code="internal_error"))

    async def _pursue(self) -> None:
        """Reach the engine; once more, restarted, if nobody listens at the first."""
        model = self._model
        assert model is not None
        if self._place is None:
            await self._external(model)
            return
        gone = ""
        for attempt in range(2 if model.restart_on_connection_failure else 1):
            if attempt:
                self._place.unreachable()
                if self.client.leave():
                    return
            unit = await self._admission(model, self._place)
            gate = self._shared.gate
            endpoint = gate.endpoint(unit)
            if endpoint is None:
                gone = "its runner has left no report"
                continue
            try:
                await self._connect(gate.connections(endpoint))
            except EngineGoneError as error:
                gone = str(error)
                _log.warning("%s: nobody answers: %s", unit, gone)
            else:
                return
        message = f"{model.name}: nobody answers at its engine: {gone}"
        raise ApiError(502, message, code="engine_unreachable", retry_after_s=1)

    async def _external(self, model: Model) -> None:
        assert self._connections is not None
        try:
            await self._connect(self._connections)
        except EngineGoneError as error:
            message = f"{model.name}: nobody answers at {model.endpoint} ({error})"
            raise ApiError(502, message, code="engine_unreachable", retry_after_s=5) from error

    async def _connect(self, connections: EngineConnections) -> None:
        self._connections = connections
        self._send(connections, connections.take() or await connections.open())

    async def _admission(self, model: Model, place: Place) -> UnitName:
        """Wait for an instance. A client that asked for a stream gets its head, and comments, after a while."""
        gate = self._shared.gate
        patience_s = gate.config.gateway.loading_keepalive_s if self._stream else None
        while (unit := await place.admitted(patience_s)) is None:
            self._comment(f"{model.name} is {await gate.stage(model)}")
        return unit

    async def _reconnect(self) -> None:
        """The warm connection had died, as it may at any time between requests: take a fresh one."""
        assert self._connections is not None
        try:
            connection = await self._connections.open()
        except EngineGoneError as error:
            message = f"the engine broke the connection: {error}"
            raise ApiError(502, message, code="engine_failed", retry_after_s=1) from error
        self._send(self._connections, connection)

    def _comment(self, text: str) -> None:
        """Send an SSE comment, which clients skip (html.spec.whatwg.org, server-sent events)."""
        head = b""
        if not self.started:
            self.started = self._events = True
            self.status = 200
            fields = [(b"content-type", b"Content-Type", _EVENTS), (b"cache-control", b"Cache-Control", b"no-cache")]
            head = self.client.head(head_lines(200, b"OK", fields) + date_line(), self._framing(None))
        comment = f": {text}\n\n".encode()
        self.client.write(head + (chunk(comment) if self._chunked else comment))

    # The answer.

    def head_for(self, head: ResponseHead, length: int | None) -> bytes:
        if not self.started:
            # Where a length is promised, nothing can be added.
            self._events = length is None and head.field(b"content-type")[: len(_EVENTS)].lower() == _EVENTS
            return super().head_for(head, length)
        if head.status != 200:
            self._error, self._withheld = bytearray(), True
        return b""

    def content(self, piece: bytes) -> bytes:
        if self._error is not None:
            self._error += piece[: _ERROR_MAX_BYTES - len(self._error)]
            return b""
        self._note(piece)
        return piece

    def _note(self, piece: bytes) -> None:
        """Keep the end of the answer, bounded: it may tell how many tokens there were."""
        size = len(piece)
        if self._beginning is not None:
            self._find_id(piece)
        self._sent += size
        if size < _SHORT_BYTES:  # such as `[DONE]`
            self._tail = self._tail[-USAGE_TAIL_BYTES:] + piece
        else:
            self._before = self._tail
            self._tail = piece if size < USAGE_TAIL_BYTES else piece[-USAGE_TAIL_BYTES:]

    def _find_id(self, piece: bytes) -> None:
        """Remember whose the answer is: clients ask for it by its id."""
        assert self._beginning is not None
        assert self._model is not None
        self._beginning += piece
        found = _ANSWER_ID.search(self._beginning)
        if found is not None:
            self._shared.gate.keep(found[1].decode("ascii", "replace"), self._model.name)
        if found is not None or len(self._beginning) > _ID_WITHIN_BYTES:
            self._beginning = None

    def unanswered(self, error: Exception | None) -> None:
        connection = self.upstream
        untouched = self._parser is None and not self._retried
        if untouched and isinstance(connection, EngineConnection) and connection.reused:
            self._retried, self.upstream = True, None
            self._spawn(again=True)
        else:
            super().unanswered(error)

    def fail(self, error: ApiError) -> None:
        """As an event where the stream allows it, so that it ends as a stream should."""
        if not (self.started and self._events) or self.over:
            super().fail(error)
            return
        self.status = error.status
        event = error.event()
        self.client.write(chunk(event) + last_chunk if self._chunked else event)
        self._finish(aborted=True)

    def _complete(self, out: bytes, *, in_step: bool) -> None:
        if self._error is None:
            super()._complete(out, in_step=in_step)
            return
        text = self._error.decode("utf-8", "replace").strip()
        self.fail(ApiError(self.status, f"the engine answered {self.status}: {text}", code="engine_error"))

    def closed(self) -> None:
        model, task = self._model, self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
        if self._place is not None:
            self._place.close()
        if self._entered is not None:
            self._entered.leave()
        if model is None:
            return
        shared = self._shared
        shared.counters_of(model.name).count(self.status, len(self._request), self._sent, self._before + self._tail)
        if shared.gate.config.gateway.request_log:
            elapsed_s = shared.loop.time() - self._begun
            method, path = self.request.method.decode(), self.request.path.decode()
            _log.info("%s %s %s %d %.3f s", method, path, model.name, self.status, elapsed_s)
