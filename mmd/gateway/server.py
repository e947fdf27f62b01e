"""HTTP on sockets that systemd listens on: serve, and leave without losing a request.

The listening sockets belong to systemd. While no gateway accepts, connections wait in the kernel's queue, so a restart refuses
nobody. Leaving takes care of three kinds of connection: those with a request in hand finish it (the answer says `Connection:
close`); those that were accepted but have not spoken yet get `GRACE_S` to do so; idle kept-alive ones are closed after it.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable
from enum import Enum, auto

from mmd.config import Gateway
from mmd.gateway.api_error import ApiError
from mmd.gateway.channel import turn_away
from mmd.gateway.places import places
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.clients import Clients, client_of, forwarded_for, is_trusted
from mmd.gateway.relay.cors import CorsExchange, cors_lines
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.inference import Inference, InferenceExchange
from mmd.gateway.relay.kept import names_answers
from mmd.gateway.relay.pages import page_refusal
from mmd.gateway.relay.refused import RefusedExchange
from mmd.gateway.relay.routing import ROUTES, Route, find_route, is_upstream
from mmd.gateway.relay.visitor import Visitor
from mmd.gateway.serving import Giver, Heir
from mmd.gateway.workers import worker_count

__all__ = ["BACKLOG", "GRACE_S", "Door", "Server"]


class Door(Enum):
    """What clients need on a server's sockets."""

    API = auto()
    """An API key, where there are any."""
    ADMIN_TCP = auto()
    """An API key for the OpenAI API; the admin API looks for itself (mmd.gateway.admin_access)."""
    ADMIN_SOCKET = auto()
    """Nothing: the socket's mode says who may."""


_log = logging.getLogger(__name__)

# asyncio calls listen() again on the inherited socket, with its own backlog: pass the unit's, or it shrinks (listen(2)).
BACKLOG = 1024
GRACE_S = 0.5
_HEALTH = b"/health"
_POLL_S = 0.02
_CHECK_S = 1.0

# How many clients to look at in one go, and when to go on: a thousand at once would keep events of streams waiting for 0.5 ms.
_CHECK_AT_ONCE = 64
_CHECK_PAUSE_S = 0.002


class Server:
    """Inference by the relay, on some listening sockets; other requests are another process's to answer."""

    administers = True
    """Whether /api may be the admin API's here."""

    def __init__(
        self,
        name: str,
        inference: Inference,
        sockets: Iterable[socket.socket],
        *,
        elsewhere: Giver | None = None,
        worker: bool = False,
        door: Door = Door.API,
    ) -> None:
        """`elsewhere`: where there are workers, takes the connections with requests for them, or as a `worker` all others."""
        self.name = name
        self.connections: set[ClientConnection] = set()
        self._clients = Clients()
        self._requests = Clients()
        """Those under way of clients behind trusted proxies, by the connections that they came by."""
        self._places = places()
        self._accepting = False
        self._opening: asyncio.Task[None] | None = None
        self.leaving = False
        self.heir: Heir | None = None
        self._inference = inference
        self._sockets = tuple(sockets)
        self._elsewhere = elsewhere
        self._worker = worker
        self._door = door
        self._let_in: set[ClientConnection] = set()
        """Of those taken over, whose first request was let in by the gateway before this one."""
        self._loop = asyncio.get_running_loop()
        self._listeners: list[asyncio.Server] = []
        self._checker: asyncio.TimerHandle | None = None
        self._unchecked: list[ClientConnection] = []
        if door is not Door.ADMIN_SOCKET:
            inference.access.changed.append(self._judge_again)

    async def start(self) -> None:
        self._accepting = True
        await self._listen()
        self._places.join(self)
        self._check()

    async def _listen(self) -> None:
        for listening in self._sockets if self._accepting else ():
            make = self._loop.create_unix_server if listening.family == socket.AF_UNIX else self._loop.create_server
            listener = await make(self._connect, sock=listening.dup(), backlog=BACKLOG)  # the copy is closed with it
            if not self._accepting:
                listener.close()
                return
            self._listeners.append(listener)

    def pause_accepting(self) -> None:
        """Let clients wait in the kernel, see mmd.gateway.places."""
        self._accepting = False
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def resume_accepting(self) -> None:
        if not self._accepting:
            self._accepting = True
            self._opening = self._loop.create_task(self._reopen())

    async def _reopen(self) -> None:
        """The boundary of a task."""
        try:
            await self._listen()
        except OSError as error:
            _log.error("%s cannot accept: %s", self.name, error)
            self.pause_accepting()
            self._loop.call_later(_CHECK_S, self._places.retry, self)

    def _close_listeners(self) -> None:
        self._places.part(self)
        self.pause_accepting()
        for listening in self._sockets:
            listening.close()

    @property
    def gateway(self) -> Gateway:
        return self._inference.gate.config.gateway

    def came(self, client: ClientConnection, fresh: bool) -> bool:
        self.connections.add(client)
        self._places.come()
        gateway, whose, limit = self.gateway, client.whose, self._limit
        peer = None if client.transport is None else client.transport.get_extra_info("peername")
        whose.client, whose.proxied = client_of(peer), is_trusted(peer, gateway.trusted_proxies)
        return limit is None or whose.proxied or self._clients.come(client, whose.client, limit, fresh=fresh)

    @property
    def _limit(self) -> int | None:
        """How many connections a client may have in this process: all together have no more than it may."""
        limit = self.gateway.connections_per_client
        return limit if limit is None or not self._worker else -(-limit // worker_count(self.gateway.workers))

    def answered(self, client: ClientConnection) -> None:
        self._requests.go(client)
        client.whose.forwarded = ""

    def _is_one_too_many(self, client: ClientConnection, request: RequestHead) -> bool:
        """Learn of a trusted proxy whom a request is from; whether that client has as many under way as it may."""
        values = (value for name, _, value in request.fields if name == b"x-forwarded-for")
        whose, limit = client.whose, self._limit
        whose.forwarded = forwarded_for(values, self.gateway.trusted_proxies)
        return limit is not None and not self._requests.come(client, whose.name if whose.forwarded else "", limit, fresh=True)

    def went(self, client: ClientConnection) -> None:
        self.connections.discard(client)
        self._clients.go(client)
        self._requests.go(client)
        self._places.go()

    def _connect(self) -> ClientConnection:
        return ClientConnection(self, self._loop)

    async def adopt(self, connection: socket.socket, read: bytes, chunked: bool | None, *, let_in: bool = False) -> None:
        """Go on with a connection that another process has accepted, see ClientConnection and Heir."""
        if self._places.full:
            turn_away(connection.detach())
            return

        def make() -> ClientConnection:
            client = ClientConnection(self, self._loop, read=read, chunked=chunked)
            if let_in:
                self._let_in.add(client)
            return client

        try:
            await self._loop.connect_accepted_socket(make, connection)
        except OSError as error:  # its client has gone meanwhile
            _log.info("a connection could not be taken over: %s", error)
            connection.close()

    def hand_over(self, heir: Heir) -> None:
        """Accept nothing more, and send every connection to `heir` as soon as it waits for nothing here."""
        self.heir = heir
        self._close_listeners()
        for connection in tuple(self.connections):
            connection.leave()

    def exchange(self, client: ClientConnection, request: RequestHead, length: int | None) -> Exchange | None:
        """Who answers this request: a model, or `other`; None: another process."""
        if request.needs_leave:
            answer = CorsExchange.of(client, request, length, self.gateway.cors_origins, administers=self.administers)
            if answer is not None:
                return answer
        route = self.route(request)
        access = self._inference.access
        visitor = access.visitor(request) if access.required and self._door is not Door.ADMIN_SOCKET else None
        if not request.plain and (visitor is None or visitor.key is None):
            refusal = self._page_refusal(client, request, route, visitor)
            if refusal is not None:
                return RefusedExchange(client, request, length, refusal)
        if self._elsewhere is not None:
            # What is counted against the limits of a key, one process counts.
            for_workers = route is not None and route.for_workers
            if visitor is not None and (visitor.limited or names_answers(request.target)):  # and it knows whose answers are
                for_workers = False
            if self._worker is not for_workers:
                self._let_in.discard(client)
                return None
        if client.whose.proxied and self._is_one_too_many(client, request):
            message = "this client has as many requests under way as it may (gateway.connections_per_client)"
            error = ApiError(429, message, code="too_many_requests", retry_after_s=1)
            return RefusedExchange(client, request, length, error)
        if visitor is not None and visitor.key is None and self._asks_for_key(request.path, route):
            return RefusedExchange(client, request, length, visitor.stranger())
        if self._door is Door.ADMIN_TCP and is_upstream(request.path):
            return RefusedExchange(client, request, length, _not_beside_the_admin_api(self.gateway))
        if route is None:
            return self.other(client, request, length, visitor)
        exchange = InferenceExchange(client, request, length, self._inference, route, visitor)
        if self._let_in and client in self._let_in:
            self._let_in.discard(client)
            exchange.counted = True
        return exchange

    def route(self, request: RequestHead) -> Route | None:
        """How to tell its model; None: it is not for one."""
        return ROUTES.get(request.path) or find_route(request.path)

    def _page_refusal(
        self, client: ClientConnection, request: RequestHead, route: Route | None, visitor: Visitor | None
    ) -> ApiError | None:
        """403 for a request without a key that a foreign web page may have made a browser send."""
        if visitor is not None and self._asks_for_key(request.path, route):
            return None  # 401 says more
        if route is None and request.path == _HEALTH:  # monitors ask by any name, and it tells nothing
            return None
        transport = client.transport
        if transport is None or transport.get_extra_info("socket").family == socket.AF_UNIX:
            return None  # no browser connects to it; what does so for one has to look itself
        gateway = self.gateway
        if request.page_edition is not gateway:
            request.page_refusal, request.page_edition = page_refusal(request, gateway), gateway
        return request.page_refusal

    def _asks_for_key(self, path: bytes, route: Route | None) -> bool:
        if self._door is Door.ADMIN_TCP:
            return route is not None or path.startswith(b"/v1/")
        return path != _HEALTH

    def other(self, client: ClientConnection, request: RequestHead, length: int | None, visitor: Visitor | None) -> Exchange:
        """Who answers a request that is not for a model."""
        raise NotImplementedError

    def cors_lines(self, origin: bytes) -> bytes:
        return cors_lines(self.gateway.cors_origins, origin)

    def pass_on(self, connection: int, read: bytes, chunked: bool | None) -> None:
        """Hand over a connection with a request that nobody answers here."""
        assert self._elsewhere is not None
        self._elsewhere(connection, read, chunked)

    def _check(self) -> None:
        """Look for silent clients; one timer for all of them costs less than one each."""
        if not self._unchecked:
            self._unchecked = list(self.connections)
        now, allowed = self._loop.time(), self.gateway.timeouts
        for connection in self._unchecked[-_CHECK_AT_ONCE:]:
            connection.check(now, allowed)
        del self._unchecked[-_CHECK_AT_ONCE:]
        self._checker = self._loop.call_later(_CHECK_PAUSE_S if self._unchecked else _CHECK_S, self._check)

    def _judge_again(self) -> None:
        """Other keys are in force: what they do not permit ends."""
        required = self._inference.access.required
        for connection in tuple(self.connections):
            exchange = connection.exchange
            if exchange is not None:
                exchange.judge_again(required=required)

    async def stop_accepting(self) -> None:
        """From now on new connections wait for the next gateway."""
        self.leaving = True
        self._close_listeners()

    async def drain(self, timeout_s: float) -> None:
        """Finish what was accepted, for `timeout_s` at most, then close every connection."""
        self.leaving, self.heir = True, None
        begun = self._loop.time()
        while (waited := self._loop.time() - begun) < timeout_s:
            if not self._busy() and (not self.connections or waited >= GRACE_S):
                break
            await asyncio.sleep(_POLL_S)
        if busy := self._busy():
            _log.warning("%d requests are cut off after gateway.drain_timeout", busy)
        if self._checker is not None:
            self._checker.cancel()
        if self._judge_again in self._inference.access.changed:
            self._inference.access.changed.remove(self._judge_again)
        for connection in tuple(self.connections):
            connection.close() if connection.exchange is None else connection.abort()

    def _busy(self) -> int:
        return sum(connection.exchange is not None for connection in self.connections)


def _not_beside_the_admin_api(gateway: Gateway) -> ApiError:
    """404: what a program under /upstream answers would be of one origin with the admin API, which its pages could drive."""
    message = f"/upstream is not served at the admin API's address; ask at {gateway.listen[0]} (gateway.listen)"
    return ApiError(404, message, code="not_found")
