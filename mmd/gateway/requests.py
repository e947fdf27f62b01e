"""Requests that are not over: shown and cancelled, in the process that relays them, and through the one that decides."""

import time
from collections.abc import Iterable, Iterator

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.account import Account
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.inference import InferenceExchange
from mmd.gateway.relay.request_id import FIELD
from mmd.status import RequestStatus

__all__ = ["cancel", "requests_on"]


def requests_on(connections: Iterable[ClientConnection], now: float) -> list[RequestStatus]:
    """The requests for models in hand on these connections; `now`: of the loop's clock."""
    return [told for told, _ in _told(connections, now)]


def cancel(connections: Iterable[ClientConnection], request: str, now: float) -> list[RequestStatus]:
    """End the request with that id: its client gets an error, a stream as its last event, and its engine is told at once.
    What it was: one, or none."""
    for told, exchange in list(_told(connections, now)):
        if told.id == request:
            message = f"request {request} was cancelled by an operator"
            exchange.fail(ApiError(503, message, code="cancelled_by_operator"))
            return [told]
    return []


def _told(connections: Iterable[ClientConnection], now: float) -> Iterator[tuple[RequestStatus, InferenceExchange]]:
    age_s = time.time() - now
    for connection in connections:
        exchange = connection.exchange
        if isinstance(exchange, InferenceExchange):
            account = exchange.account()
            if account is not None:
                yield _status(exchange.request, account, _address(connection), age_s), exchange


def _status(request: RequestHead, account: Account, client: str, age_s: float) -> RequestStatus:
    """`age_s`: from the loop's clock to Unix time."""
    return RequestStatus(
        id=f"{account.id_prefix.decode()}{account.number}",
        client_id=request.field(FIELD).decode() if request.id_line else "",
        model=account.model.name,
        method=request.method.decode(),
        path=request.path.decode("ascii", "replace"),
        state=account.state,
        since=account.begun + age_s,
        stream=account.stream,
        client=client,
        sent_bytes=account.sent_bytes,
        tokens=account.tokens,
        key=account.key,
    )


def _address(connection: ClientConnection) -> str:
    """Of the client: `192.0.2.7:4711`, `[2001:db8::7]:4711`; without a port where a trusted proxy tells it."""
    if connection.whose.forwarded:
        return connection.whose.forwarded
    peer = None if connection.transport is None else connection.transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return "unix"
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
