"""Inference requests: routed by the model in the body, each for itself, whatever its connection asked for before.

A request whose model is ready and for which a connection is warm goes to the engine in the call stack that received it. All
others wait for admission and connect in a task, see mmd.gateway.relay.waiting.
"""

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING

from mmd.config import EngineKind
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.access import Access
from mmd.gateway.relay.account import Account
from mmd.gateway.relay.counters import USAGE_TAIL_BYTES, Counters, tokens_so_far
from mmd.gateway.relay.engine import EngineConnection, EngineConnections
from mmd.gateway.relay.framing import chunk, last_chunk
from mmd.gateway.relay.gate import Gate
from mmd.gateway.relay.head import RequestHead, ResponseHead
from mmd.gateway.relay.kept import IdFinder, names_answers, referred_to, with_owner
from mmd.gateway.relay.request_id import own_line
from mmd.gateway.relay.room import count_share, has_room
from mmd.gateway.relay.routing import Aim, Route, UnknownAnswerError, not_taken
from mmd.gateway.relay.visitor import Visitor, objection
from mmd.gateway.relay.waiting import EVENTS, WaitingExchange, wait_of
from mmd.printable import quoted
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

_SHORT_BYTES = 64

_KEEPING = b"/v1/responses"


# So much is never too much. Most processes hold no more, and need not look.
_ALWAYS_BYTES = 1 << 20


def _no_room() -> ApiError:
    message = "the requests under way take all the memory that they may (gateway.max_buffered)"
    return ApiError(503, message, code="too_much_buffered", retry_after_s=1)


class Inference:
    """What all inference requests share."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.access = Access()
        self.counters: dict[str, Counters] = {}
        """By model name."""
        self.held_bytes = 0
        """The bodies that are here, see gateway.max_buffered."""
        self.shares: dict[str, int] = {}
        """Of these, what clients (`Whose.name`) have, as far as it was counted: while there is little it is not."""
        self.loop = asyncio.get_running_loop()
        self.id_prefix = f"{secrets.token_hex(3)}-".encode()
        """Of the ids of requests: no other process has the same."""
        self.last_number = 0

    def has_room(self, client: str, more: int = 0) -> bool:
        """Whether `more` bytes of bodies may be held besides, of a client."""
        held, own = self.held_bytes + more, self.shares.get(client, 0) + more
        return has_room(self.gate.config.gateway, held, own)

    def counters_of(self, model: str) -> Counters:
        counters = self.counters.get(model)
        if counters is None:
            counters = self.counters[model] = Counters()
        return counters


class InferenceExchange(WaitingExchange):
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
        super().__init__(client, request, length, shared)
        self.number = shared.last_number = shared.last_number + 1
        if not self.id_line:
            self.id_line = own_line(shared.id_prefix, self.number)
        self._route = route
        self.sandboxed = not route.own_origin
        self._visitor = visitor
        self._entered: Visitor | None = None
        """Where it is counted."""
        self.counted = False
        """The gateway before this one has counted it against the limits of its key."""
        self._pieces: bytearray | None = None
        """Of its body, in one: a list of pieces of two bytes would take twenty times as much memory."""
        self._body_size = 0
        self._held = 0
        """How much of `Inference.held_bytes` is its own."""
        self._shared_bytes = 0
        """And of `Inference.shares`, its client's,"""
        self._whose = ""
        """whom it has when there is something."""
        self._target = b""
        self._body_in = b""
        """As the client sent it."""
        self._request = b""
        """The body as the engine gets it."""
        self._retried = False
        self._error: bytearray | None = None
        """The engine's error, while it is collected to become an event."""
        self._name = ""
        """What the client calls the model."""
        self._finder: IdFinder | None = None
        """Of an answer that the engine keeps, until its id was found."""
        self._sent = 0
        self._before = b""
        self._tail = b""

    # The request.

    def begin(self) -> None:
        if self.request.method not in self._route.methods:
            self.fail(not_taken(self.request, self._route.methods))
        elif self.length and self.length > self._limit():
            self.fail(self._too_large())
        elif self.length and not self._has_room(self.length):
            self.fail(_no_room())

    def _hold(self, size: int) -> None:
        """Reckon with `size` bytes of its body."""
        shared = self._shared
        shared.held_bytes += size - self._held
        self._held = size
        if self._shared_bytes or shared.held_bytes > _ALWAYS_BYTES:
            self._count_share(size)

    def _count_share(self, size: int) -> None:
        if not self._shared_bytes:
            self._whose = self.client.whose.name
        count_share(self._shared.shares, self._whose, size - self._shared_bytes)
        self._shared_bytes = size

    def _has_room(self, more: int = 0) -> bool:
        """Whether its client may have so much more here."""
        shared = self._shared
        return shared.held_bytes + more <= _ALWAYS_BYTES or shared.has_room(self.client.whose.name, more)

    def _limit(self) -> int:
        return self._shared.gate.config.gateway.max_body_bytes

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {format_size(self._limit())} (gateway.max_body)"
        return ApiError(413, message, code="body_too_large")

    def feed(self, piece: bytes) -> None:
        size = self._body_size = self._body_size + len(piece)
        if self._pieces is None:
            self._pieces = bytearray(piece)
        else:
            self._pieces += piece
        self._hold(size)
        if size > self._limit():
            self.fail(self._too_large())
        elif not self._has_room():
            self.fail(_no_room())

    def end(self) -> None:
        body, self._pieces = bytes(self._pieces or b""), None
        self.whole(body)

    def whole(self, body: bytes) -> None:
        """Forward: at once where possible, else in a task."""
        gate = self._shared.gate
        config = gate.config
        if self.request.method not in self._route.methods or len(body) > config.gateway.max_body_bytes:
            self.begin()
            return
        self._hold(len(body))
        if not self._has_room():
            self.fail(_no_room())
            return
        try:
            if self.request.wait:
                self._wait_s = wait_of(self.request.wait)
            seen = config if self._visitor is None else self._visitor.view(config)
            aim = self._route.aim(self.request, body, seen, gate.kept())
        except UnknownAnswerError as unknown:  # by another name than below: to mypyc one name has one type
            self._task = self._shared.loop.create_task(self._seek(unknown.answer, body))
        except ApiError as error:
            self.fail(error)
        else:
            self._forward(aim, body)

    async def _seek(self, answer: str, body: bytes) -> None:
        """Another process may be about to tell us whose the answer is."""
        kept = self._shared.gate.kept()
        await kept.turn_up(answer)
        try:
            config = self._shared.gate.config
            aim = self._route.aim(self.request, body, config if self._visitor is None else self._visitor.view(config), kept)
        except ApiError as error:
            self.fail(error)
        else:
            self._forward(aim, body)

    def _forward(self, aim: Aim, body: bytes) -> None:
        gate = self._shared.gate
        model, self._stream, self._request, self._target, name = aim
        self._name = name
        if self._visitor is not None:
            if names_answers(self.request.target):
                if self._target.partition(b"?")[0] == _KEEPING and self.request.method == b"POST":
                    self._finder = IdFinder()
                for answer in referred_to(self.request.method, self._target, body):
                    if not self._visitor.owns(gate.kept().owner(answer)):
                        self.fail(UnknownAnswerError(answer))
                        return
            refusal = self._visitor.enter(model, name, counted=self.counted)
            if refusal is not None:
                self.fail(refusal)
                return
            self._entered = self._visitor
        self._model, self._body_in, self._body_size = model, body, len(self._request)
        if self._route.answers_are_kept:
            self._finder = IdFinder()
        self._begun = self._shared.loop.time()
        if self.client.leave():
            return
        if model.engine is EngineKind.EXTERNAL:
            endpoint = model.endpoint
        else:
            self._place = place = gate.request(model, self._wait_s)
            unit = place.unit
            endpoint = gate.endpoint(unit) if unit is not None else None
        if endpoint is not None:
            self._connections = connections = gate.connections(endpoint)
            connection = connections.take()
            if connection is not None:
                self._send(connections, connection)
                return
        self._spawn(again=False)

    def _comment(self, text: str) -> None:
        """What the request waits for names other models."""
        super()._comment("the model is not ready yet" if self._visitor is not None and self._visitor.confined else text)

    def resume(self, *, chunked: bool) -> None:
        self.started = self._events = True
        self.status, self._chunked = 200, chunked

    def judge_again(self, *, required: bool) -> None:
        if self._model is not None and not self.over:  # else it is judged when it is known what it asks for
            error = objection(self._visitor, self._model, self._name, required=required)
            if error is not None:
                self.fail(error)

    def unsent(self) -> bytes | None:
        waiting = self.upstream is None and (self._place is None or self._place.waiting)
        if self._model is None or self.over or not waiting or self.request.websocket:
            return None
        return self.request.written(len(self._body_in), self._wait_left(), self.id_line) + self._body_in

    def account(self) -> Account | None:
        """How it stands; None while it is not known which model it is for."""
        if self._model is None or self.over:
            return None
        state = "waiting" if self.upstream is None else "answering" if self.status else "sent"
        tokens = tokens_so_far(self._before + self._tail)
        key = self._entered.key if self._entered is not None else None
        prefix, name = self._shared.id_prefix, key.name if key is not None else ""
        return Account(prefix, self.number, self._model, state, self._begun, self._stream, self._sent, tokens, name)

    def withdraw(self) -> None:
        self._model = None  # its counters are the other's
        super().withdraw()

    def _send(self, connections: EngineConnections, connection: EngineConnection) -> None:
        request, body, host = self.request, self._request, connections.host
        if self._route.keeps_host and self._model is not None and self._model.engine is EngineKind.COMMAND:
            host = request.host or host
        framed = body or self.length is not None
        framing = b"Content-Length: " + str(len(body)).encode() + b"\r\n" if framed else self._unframed()
        head = b"%b %b%b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n" % (  # nothing but %b, which mypyc joins by itself
            request.method,
            connections.prefix,
            self._target,
            host,
            self.id_line,
            request.engine_lines if not self.client.whose.proxied else request.engine_lines + request.forwarded_lines,
            framing,
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

    # The answer.

    def head_for(self, head: ResponseHead, length: int | None) -> bytes:
        self._hold(0)
        self._request = self._body_in = b""  # nobody will need it again, and the answer may take an hour
        if head.status != 200 and head.field(b"location") and self._connections is not None:
            head.lines = self._route.lines(self.request, self._target, self._connections.host, head)
        if not self.started:
            # Where a length is promised, nothing can be added.
            self._events = length is None and head.field(b"content-type")[: len(EVENTS)].lower() == EVENTS
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
        if self._finder is not None:
            self._find_id(self._finder, piece)
        self._sent += size
        if size < _SHORT_BYTES:  # such as `[DONE]`
            self._tail = self._tail[-USAGE_TAIL_BYTES:] + piece
        else:
            self._before = self._tail
            self._tail = piece if size < USAGE_TAIL_BYTES else piece[-USAGE_TAIL_BYTES:]

    def _find_id(self, finder: IdFinder, piece: bytes) -> None:
        """Remember whose the answer is: clients ask for it by its id."""
        answer = finder.feed(piece)
        if answer is not None and self._model is not None:
            owner = "" if self._visitor is None else self._visitor.owner
            self._shared.gate.kept().add(answer, with_owner(self._model.name, owner))
        if finder.over:
            self._finder = None

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
        if self._visitor is not None:
            error = self._visitor.veil(error, self._model)
        if not (self.started and self._events) or self.over:
            super().fail(error)
            return
        self.status = error.status
        event = error.event(self.request.path)
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
        self._hold(0)
        if self._entered is not None:
            self._entered.leave()
        if model is None:
            return
        shared = self._shared
        shared.counters_of(model.name).count(self.status, self._body_size, self._sent, self._before + self._tail)
        if shared.gate.config.gateway.request_log:
            elapsed_s = shared.loop.time() - self._begun
            method, path = self.request.method.decode(), self.request.path.decode()
            client = self.client.whose.forwarded or self.client.whose.client or "unix"
            _log.info("%s %s %s %d %.3f s %s", method, path, quoted(model.name), self.status, elapsed_s, client)
