"""All routes of the admin API put together."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from mmd.answers import Gpus
from mmd.gateway.admin.configuration import ConfigurationRoutes, Reload
from mmd.gateway.admin.events import EventRoutes
from mmd.gateway.admin.logs import LogRoutes
from mmd.gateway.admin.models import ModelRoutes
from mmd.gateway.admin.openapi import document
from mmd.gateway.admin.requests import RequestRoutes
from mmd.gateway.admin.route import ApiResponse, Route, as_json, sees_all
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.operations import Operations
from mmd.gateway.pin_book import PinBook
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.snapshot import Snapshot
from mmd.scope import Scope
from mmd.status import Status

if TYPE_CHECKING:
    from mmd.gateway.workers.census import Census

__all__ = ["AdminApi"]


class AdminApi:
    """`more`: routes that others bring, which are documented like the rest. See RequestRoutes on `connections` and `census`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        snapshot: Snapshot,
        pins: PinBook,
        scope: Scope,
        reload: Reload,
        *,
        connections: Callable[[], Iterable[ClientConnection]],
        census: "Callable[[], Census | None]",
        more: Iterable[Route] = (),
    ) -> None:
        self._snapshot = snapshot
        self._closing = asyncio.Event()
        self._document: dict[str, Any] | None = None
        operations = Operations(dispatcher, snapshot, pins)
        self.routes: tuple[Route, ...] = (
            *self._overviews(),
            *ModelRoutes(dispatcher, snapshot, operations).routes(),
            *RequestRoutes(dispatcher, operations, connections, census).routes(),
            *EventRoutes(dispatcher.narrator.log, self._closing).routes(),
            *LogRoutes(dispatcher, scope, self._closing).routes(),
            *ConfigurationRoutes(dispatcher, scope, reload).routes(),
            *more,
        )

    def _overviews(self) -> list[Route]:
        described = ApiResponse("OpenAPI 3.1.", dict[str, Any])
        return [
            Route("GET", "/api/v1/openapi.json", self.openapi, "This document", described),
            Route("GET", "/api/v1/status", self.status, "Everything at a glance", ApiResponse("What mmdctl shows.", Status)),
            Route("GET", "/api/v1/gpus", self.gpus, "The GPUs", ApiResponse("Their memory, and who may have it.", Gpus)),
        ]

    def definition(self, route: Route) -> web.RouteDef:
        """The place of one of `routes` in an application."""
        others = {other.path.removeprefix(route.path) for other in self.routes if other.path.startswith(f"{route.path}/")}
        return route.definition(sorted(others))

    def end_streams(self) -> None:
        """Let those who follow events and logs come back, to the next gateway."""
        self._closing.set()

    async def openapi(self, _: web.Request) -> web.Response:
        if self._document is None:
            self._document = document(self.routes)
        return as_json(self._document)

    async def status(self, _: web.Request) -> web.Response:
        status = self._snapshot.status()
        return as_json(status if sees_all() else status.without_private())

    async def gpus(self, _: web.Request) -> web.Response:
        status = self._snapshot.status()
        return as_json(Gpus(status.gpus, status.gateway.gpu_problem))
