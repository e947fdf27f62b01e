"""What waits and what is under way: the queue, the requests, and the end of one."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from aiohttp import web

from mmd.answers import Queue, Requests
from mmd.gateway.admin.route import ApiResponse, Route, as_json
from mmd.gateway.api_error import ApiError
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.operations import Operations
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.requests import cancel, requests_on
from mmd.status import QueuedStatus, RequestStatus

if TYPE_CHECKING:
    from mmd.gateway.workers.census import Census

__all__ = ["RequestRoutes"]


class RequestRoutes:
    """`connections`: all that this process serves at the moment; `census`: of the workers, if there are any."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        operations: Operations,
        connections: Callable[[], Iterable[ClientConnection]],
        census: "Callable[[], Census | None]",
    ) -> None:
        self._dispatcher = dispatcher
        self._operations = operations
        self._connections = connections
        self._census = census

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                "/api/v1/queue",
                self.queue,
                "What waits for its model",
                ApiResponse("Requests and operators in the order in which they are let in, model by model.", Queue),
            ),
            Route(
                "GET",
                "/api/v1/requests",
                self.requests,
                "Requests that are not over",
                ApiResponse("Those for models, waiting or under way, the oldest first.", Requests),
                description="What a gateway that was replaced by an upgrade still answers is not among them.",
                private=True,  # whose they are, and when they came
            ),
            Route(
                "DELETE",
                "/api/v1/requests/{id}",
                self.cancel,
                "Cancel a request",
                ApiResponse("What it was.", RequestStatus),
                description="The client gets the error `cancelled_by_operator`, as a last event; the engine is told.",
                errors=(404,),
            ),
        ]

    async def queue(self, _: web.Request) -> web.Response:
        state, age_s = self._dispatcher.scheduler.state, time.time() - time.monotonic()
        places = []
        for name, queue in state.queues.items():
            words = self._operations.words(state.config.models[name])
            places += [
                QueuedStatus(name, position, waiter.since + age_s, words, waiter.operator)
                for position, waiter in enumerate(queue, start=1)
            ]
        return as_json(Queue(tuple(places)))

    async def requests(self, _: web.Request) -> web.Response:
        census = self._census()
        found = requests_on(self._connections(), time.monotonic())
        found += [] if census is None else await census.requests()
        return as_json(Requests(tuple(sorted(found, key=lambda each: each.since))))

    async def cancel(self, request: web.Request) -> web.Response:
        wanted, census = request.match_info["id"], self._census()
        found = cancel(self._connections(), wanted, time.monotonic())
        if not found and census is not None:
            found = await census.cancel(wanted)
        if not found:
            message = f"there is no request {wanted!r} under way; GET /api/v1/requests lists those that are"
            raise ApiError(404, message, code="no_such_request")
        return as_json(found[0])
