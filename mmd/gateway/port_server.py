"""A model's own port that speaks HTTP: the relay, with one model for whatever is asked."""

import socket
from collections.abc import Iterable

from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.inference import Inference
from mmd.gateway.relay.port_route import PortRoute
from mmd.gateway.relay.routing import Route
from mmd.gateway.server import Server

__all__ = ["PortServer"]

_KEPT = b"/v1/responses"


class PortServer(Server):
    administers = False

    def __init__(self, name: str, inference: Inference, sockets: Iterable[socket.socket], model: str) -> None:
        super().__init__(name, inference, sockets)
        self.model = model
        self._route = PortRoute(model)
        self._route_of_kept = PortRoute(model, answers_are_kept=True)

    def route(self, request: RequestHead) -> Route:
        kept = request.path == _KEPT and request.method == b"POST"
        return self._route_of_kept if kept else self._route
