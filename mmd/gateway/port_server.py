"""A model's own port that speaks HTTP: the relay, with one model for whatever is asked."""

import socket
from collections.abc import Iterable

from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.inference import Inference, InferenceExchange
from mmd.gateway.relay.port_route import PortRoute
from mmd.gateway.server import Server

__all__ = ["PortServer"]

_KEPT = b"/v1/responses"


class PortServer(Server):
    def __init__(self, name: str, inference: Inference, sockets: Iterable[socket.socket], model: str) -> None:
        super().__init__(name, inference, sockets)
        self.model = model
        self._route = PortRoute(model)
        self._route_of_kept = PortRoute(model, answers_are_kept=True)

    def exchange(self, client: ClientConnection, request: RequestHead, length: int | None) -> Exchange:
        kept = request.path == _KEPT and request.method == b"POST"
        return InferenceExchange(client, request, length, self._inference, self._route_of_kept if kept else self._route)
