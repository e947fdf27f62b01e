"""A model's own port that speaks anything (`port_protocol: tcp`): each connection becomes a tunnel to the engine.

A connection starts or wakes the model; nothing is read of it before it can be passed on. The model is in use while bytes move
(Patience in mmd.gateway.tunnel); after that the connection stays, but holds nobody up: the model may leave, which cuts the
connection, and if it is still there when somebody speaks again, that is a new request for it.
"""

import asyncio
import logging
import os
import socket
from typing import Final

from mmd.config import EngineKind, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.engine_socket import EngineAddress, EngineGoneError, EngineUnavailableError
from mmd.gateway.places import places
from mmd.gateway.relay.clients import Clients, Whose, client_of, is_trusted
from mmd.gateway.serving import Heir
from mmd.gateway.ticket import Ticket
from mmd.gateway.tunnel import RESET, Patience, Tunnel
from mmd.names import UnitName
from mmd.printable import quoted

__all__ = ["TunnelServer"]

_log = logging.getLogger(__name__)

_POLL_S: Final = 0.02
_CHECK_S: Final = 1.0

# As asyncio's servers: how many to accept in one go, and how long to wait when there are too many open files.
_ACCEPT_AT_ONCE: Final = 64
_ACCEPT_PAUSE_S: Final = 1.0


class TunnelServer:
    def __init__(
        self, name: str, dispatcher: Dispatcher, listening: socket.socket, model: str, *, patience: Patience | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.connections: set[_Visit] = set()
        self._clients = Clients()
        self.leaving = False
        self.heir: Heir | None = None
        self.dispatcher = dispatcher
        self.patience = patience or Patience()
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._places = places()
        self._retry: asyncio.TimerHandle | None = None
        self._checker: asyncio.TimerHandle | None = None
        self._accepting = False

    async def start(self) -> None:
        self._listening.setblocking(False)
        self._accepting = True
        self._listen()
        self._places.join(self)
        self._check()

    def _check(self) -> None:
        """Look for clients, and engines, that read nothing."""
        now, stalled_s = self._loop.time(), self.dispatcher.config.gateway.timeouts.stalled_s
        for visit in tuple(self.connections):
            visit.check(now, stalled_s)
        self._checker = self._loop.call_later(_CHECK_S, self._check)

    def pause_accepting(self) -> None:
        """Let clients wait in the kernel, see mmd.gateway.places."""
        if self._accepting:
            self._accepting = False
            if self._retry is not None:
                self._retry.cancel()
                self._retry = None
            self._loop.remove_reader(self._listening.fileno())

    def resume_accepting(self) -> None:
        if not self._accepting:
            self._accepting = True
            self._listen()

    def _listen(self) -> None:
        self._retry = None
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, peer = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("%s cannot accept: %s", self.name, error)
                self._loop.remove_reader(self._listening.fileno())
                self._retry = self._loop.call_later(_ACCEPT_PAUSE_S, self._listen)
                return
            self._take(connection, peer, fresh=True)
            if not self._accepting:
                return

    def _take(self, connection: socket.socket, peer: object, *, fresh: bool) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            # A client that has vanished is noticed at some time, and what it holds here ends.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        visit = _Visit(self, connection)
        self.connections.add(visit)
        self._places.come()
        gateway, visit.whose.client = self.dispatcher.config.gateway, client_of(peer)
        limit = None if is_trusted(peer, gateway.trusted_proxies) else gateway.connections_per_client
        if limit is not None and not self._clients.come(visit, visit.whose.client, limit, fresh=fresh) and fresh:
            message = "its client has as many as it may (gateway.connections_per_client)"
            _log.warning("a connection to the port of %s is closed: %s", quoted(self.model), message)
            visit.abort()

    def went(self, visit: "_Visit") -> None:
        if visit in self.connections:
            self.connections.discard(visit)
            self._clients.go(visit)
            self._places.go()

    async def adopt(self, connection: socket.socket, read: bytes, chunked: bool | None, *, let_in: bool = False) -> None:
        """One that waits for its model: nothing was read of it."""
        try:
            peer = connection.getpeername()
        except OSError:  # it has gone meanwhile, which is found out as of any other
            peer = ""
        if self._places.full:
            connection.close()
        else:
            self._take(connection, peer, fresh=False)

    def hand_over(self, heir: Heir) -> None:
        self.heir = heir
        self._close()
        for visit in tuple(self.connections):
            visit.leave(heir)

    async def stop_accepting(self) -> None:
        self.leaving = True
        self._close()

    def _close(self) -> None:
        self._places.part(self)
        self.pause_accepting()
        self._listening.close()

    async def drain(self, timeout_s: float) -> None:
        self.leaving, self.heir = True, None
        begun = self._loop.time()
        while any(visit.busy for visit in self.connections) and self._loop.time() - begun < timeout_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        if busy := sum(visit.busy for visit in self.connections):
            _log.warning("%d connections to the port of %s are cut off after gateway.drain_timeout", busy, quoted(self.model))
        self._end_checks()
        for visit in tuple(self.connections):
            visit.abort()

    def _end_checks(self) -> None:
        if self._checker is not None:
            self._checker.cancel()

    async def empty(self) -> None:
        """Wait until the last connection has ended by itself."""
        while self.connections:  # noqa: ASYNC110 - they may take hours
            await asyncio.sleep(_ACCEPT_PAUSE_S)
        self._end_checks()


class _Visit:
    """A client of the port."""

    def __init__(self, server: TunnelServer, connection: socket.socket) -> None:
        self._server = server
        self.whose = Whose()
        self._dispatcher = server.dispatcher
        self._connection: socket.socket | None = connection
        """The client's, until the tunnel has it."""
        self._loop = asyncio.get_running_loop()
        self._model: Model | None = None
        self._unit: UnitName | None = None
        self._place: Ticket | None = None
        self._tunnel = Tunnel(self._ended, patience=server.patience, on_silence=self._fall_silent, on_wish=self._ask_again)
        self._joining = False
        self._peeking = False
        self._task: asyncio.Task[None] | None = self._loop.create_task(self._guard(again=False))

    @property
    def busy(self) -> bool:
        """Whether it is in use, or waits for its model."""
        return self._connection is not None or self._tunnel.open or self._place is not None

    @property
    def idle_since(self) -> float | None:
        """Since when nobody has used it; None: it is in use."""
        return None if self.busy else self._tunnel.last_moved

    def check(self, now: float, stalled_s: float) -> None:
        self._tunnel.check(now, stalled_s)

    async def _guard(self, *, again: bool) -> None:
        """The boundary of a task: a failure ends the connection."""
        try:
            await (self._readmit() if again else self._pursue())
        except ApiError as error:
            _log.warning("a connection to the port of %s is closed: %s", quoted(self._server.model), error.message)
            self.abort()
        except OSError as error:  # the client has gone meanwhile
            _log.info("a connection to the port of %s has ended: %s", quoted(self._server.model), error)
            self.abort()
        except Exception:
            _log.exception("a connection to the port of %s failed", quoted(self._server.model))
            self.abort()

    async def _pursue(self) -> None:
        model = self._model = self._dispatcher.config.models.get(self._server.model)
        if model is None:
            raise ApiError(404, f"{self._server.model} is no longer in the configuration", code="model_not_found")
        if model.engine is EngineKind.EXTERNAL:
            try:
                await self._connect(model.endpoint or "")
            except EngineGoneError as error:
                raise ApiError(502, f"{model.endpoint}: {error}", code="engine_unreachable") from error
        elif not await self._reach(model):
            return
        assert self._connection is not None
        self._joining = True
        try:
            await self._loop.connect_accepted_socket(lambda: self._tunnel.client, self._connection)
        finally:
            self._joining = False
        self._connection = None
        if self._tunnel.over:  # the engine has ended it meanwhile
            self.abort()
            self._ended()
        else:
            self._tunnel.pass_on()

    async def _reach(self, model: Model) -> bool:
        """Reach the engine; once more, restarted, if nobody listens at the first. False: another gateway does it."""
        self._place = place = self._dispatcher.request(model)
        gone = "its runner has left no report"
        for attempt in range(2 if model.restart_on_connection_failure else 1):
            if attempt:
                place.unreachable(None)
                if self._server.heir is not None and self.leave(self._server.heir):
                    return False
            self._peek(begin=place.waiting)
            unit = await place.admitted()
            self._peek(begin=False)
            assert unit is not None
            endpoint = self._dispatcher.endpoint(unit)
            if endpoint is None:
                continue
            try:
                await self._connect(endpoint)
            except EngineGoneError as error:
                gone = error.message
                _log.warning("%s: nobody answers: %s", unit, gone)
            else:
                self._unit = unit
                return True
        raise ApiError(502, f"nobody answers at its engine: {gone}", code="engine_unreachable")

    async def _connect(self, endpoint: str) -> None:
        """EngineGoneError; ApiError when it cannot be reached at present."""
        try:
            await EngineAddress(endpoint).connect(lambda: self._tunnel.engine)
        except EngineUnavailableError as error:
            raise ApiError(503, f"its engine cannot be reached at present: {error}", code=error.code) from error

    # While the model loads.

    def _peek(self, *, begin: bool) -> None:
        """Look whether the client goes away meanwhile: one that says nothing and ends its side has gone."""
        connection = self._connection
        if connection is None or begin is self._peeking:
            return
        self._peeking = begin
        if begin:
            self._loop.add_reader(connection.fileno(), self._look)
        else:
            self._loop.remove_reader(connection.fileno())

    def _look(self) -> None:
        assert self._connection is not None
        try:
            gone = not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        self._peek(begin=False)
        if gone:
            self.abort()

    def leave(self, heir: Heir) -> bool:
        """Move to the gateway that comes after this one; False: not so, an engine has been found already."""
        admitted = self._place is not None and not self._place.waiting
        if self._connection is None or self._tunnel.engine.transport is not None or admitted:
            return False
        heir(os.dup(self._connection.fileno()), b"", None, False)
        self._ended()
        return True

    # While there is a tunnel.

    def _fall_silent(self) -> None:
        """Nobody uses it at present. What mmd does not start need not be given back."""
        if self._unit is None:
            self._tunnel.pass_on()
        else:
            self._give_back()

    def _give_back(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def _ask_again(self) -> None:
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._guard(again=True))

    async def _readmit(self) -> None:
        """Somebody speaks after a silence: the model is asked for again, and has to be the same instance of it."""
        model, unit = self._model, self._unit
        assert model is not None
        assert unit is not None
        if self._dispatcher.retired or not await self._asked(model, unit):
            # Another instance is no use to it, and a gateway that has been relieved has nobody to ask: it counts here, and the
            # one that decides hears of it.
            (request,) = self._dispatcher.inherit(unit, 1, None)
            self._place = Ticket(self._dispatcher, request, model, unit=unit)
        self._tunnel.pass_on()

    async def _asked(self, model: Model, unit: UnitName) -> bool:
        """Whether it was let in to `unit`; ApiError when it is turned away."""
        self._place = place = self._dispatcher.request(model)
        try:
            admitted = await place.admitted()
        except ApiError:
            if self._dispatcher.retired:
                return False
            raise
        if admitted != unit:
            place.close()
        return admitted == unit

    # The end.

    def _ended(self) -> None:
        """Both connections have ended, as far as there were two."""
        if self._joining:
            return
        self._peek(begin=False)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._give_back()
        self._server.went(self)
        task = self._task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()

    def abort(self) -> None:
        """End it so that the client does not take it for a proper end."""
        if self._connection is not None and self._connection.family != socket.AF_UNIX and not self._joining:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if not self._tunnel.abort():
            self._ended()
