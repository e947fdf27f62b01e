"""The part of an inference request that waits, in a task: for its model, for a connection, for an engine that is restarted."""

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Final

from mmd.config import Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.engine_socket import EngineGoneError, EngineUnavailableError
from mmd.gateway.relay.engine import EngineConnection, EngineConnections
from mmd.gateway.relay.exchange import Exchange, date_line
from mmd.gateway.relay.framing import chunk
from mmd.gateway.relay.gate import Place
from mmd.gateway.relay.head import RequestHead, head_lines
from mmd.gateway.relay.sandbox import SANDBOX_LINES
from mmd.names import UnitName
from mmd.printable import quoted
from mmd.quantity import DURATION_PATTERN, parse_duration

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection
    from mmd.gateway.relay.inference import Inference

__all__ = ["EVENTS", "WaitingExchange", "wait_of"]

_log = logging.getLogger(__name__)

EVENTS: Final = b"text/event-stream"

_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_DURATION: Final = re.compile(DURATION_PATTERN, re.ASCII)

# What is left of a wait whose end has passed while its request moved to another process: not 0, which does not wait at all.
_LEAST_WAIT_S: Final = 0.001


def wait_of(value: bytes) -> float:
    """X-MMD-Wait in seconds: a number of them, or a duration as in the configuration. ApiError 400 when it is neither."""
    text = value.decode("ascii", "replace").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    if len(text) <= 20 and _DURATION.fullmatch(text):
        return parse_duration(text)
    message = f"X-MMD-Wait: {text[:40]!r} is no duration: write 5s, 500ms, or a number of seconds; 0 does not wait"
    raise ApiError(400, message, code="invalid_wait")


class WaitingExchange(Exchange):
    """What of an inference request has to do with waiting."""

    def __init__(self, client: "ClientConnection", request: RequestHead, length: int | None, shared: "Inference") -> None:
        super().__init__(client, request, length)
        self._shared = shared
        self._model: Model | None = None
        self._stream = False
        self._begun = 0.0
        self._wait_s: float | None = None
        """How long the client wants to wait for its model; None: as long as anybody may."""
        self._place: Place | None = None
        self._task: asyncio.Task[None] | None = None
        self._connections: EngineConnections | None = None
        self._events = False
        """The client gets an event stream, in which an error can be told at any time."""

    def _send(self, connections: EngineConnections, connection: EngineConnection) -> None:
        """Send the request to an engine."""
        raise NotImplementedError

    def _left_s(self) -> float | None:
        """What is left of the client's own bound to the wait."""
        if not self._wait_s:
            return self._wait_s
        return max(_LEAST_WAIT_S, self._wait_s - (self._shared.loop.time() - self._begun))

    def _wait_left(self) -> bytes:
        """The same as a header has it."""
        return b"%.3f" % (self._left_s() or 0.0)

    def _spawn(self, *, again: bool) -> None:
        self._task = self._shared.loop.create_task(self._guard(again=again))

    async def _guard(self, *, again: bool) -> None:
        """The boundary of the task: a failure is answered."""
        try:
            await (self._reconnect() if again else self._pursue())
        except ApiError as error:
            self.fail(error)
        except EngineUnavailableError as unavailable:  # by another name than above: to mypyc one name has one type
            self.fail(self._unavailable(unavailable))
        except Exception:
            _log.exception("a request for %s failed", quoted(self._model.name) if self._model else "no model")
            self.fail(ApiError(500, "internal error; see journalctl -u mmd-gateway", code="internal_error"))

    def _unavailable(self, error: EngineUnavailableError) -> ApiError:
        """No engine is touched: whether one is dead is for systemd to say."""
        name = self._model.name if self._model else "no model"
        _log.warning("%s: its engine cannot be reached at present: %s", name, error)
        message = f"{name}: its engine cannot be reached at present: {error}"
        return ApiError(503, message, code=error.code, retry_after_s=1)

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
                self._place.unreachable(self._left_s())
                if self.client.leave():
                    return
            unit = await self._admission(self._place)
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

    async def _admission(self, place: Place) -> UnitName:
        """Wait for an instance. A client that asked for a stream gets its head, and comments, after a while."""
        patience_s = self._shared.gate.config.gateway.loading_keepalive_s if self._stream else None
        while (unit := await place.admitted(patience_s)) is None:
            self._comment(await place.progress())
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
            fields = [(b"content-type", b"Content-Type", EVENTS), (b"cache-control", b"Cache-Control", b"no-cache")]
            more = SANDBOX_LINES if self.sandboxed else b""
            head = self.client.head(head_lines(200, b"OK", fields) + more + date_line(), self._framing(None))
        comment = f": {text}\n\n".encode()
        self.client.write(head + (chunk(comment) if self._chunked else comment))
