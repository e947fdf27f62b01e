"""A gateway of relay_gateway.py with the whole admin API on the same port, and a client of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from relay_gateway import Engine, Running, engine, gateway

from mmd.gateway.admin import AdminApi
from mmd.gateway.admin.registry import RegistryRoutes
from mmd.gateway.admin_access import AdminAccess
from mmd.gateway.application import ApplicationServer
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.gauges import Gauges
from mmd.gateway.memory import Memory
from mmd.gateway.pin_book import PinBook
from mmd.gateway.snapshot import Snapshot
from mmd.gateway.workers.staff import Staff
from mmd.gpu import GpuProvider
from mmd.scope import Scope, ScopeKind

__all__ = ["Administered", "administered", "events_in", "scope_in"]

NAMES = ("m", "demo/llama 8b")


class Administered:
    """A gateway that runs, and what the test needs of it."""

    def __init__(self, running: Running, api: AdminApi, http: aiohttp.ClientSession) -> None:
        self.running = running
        self.api = api
        self.http = http

    async def get(self, path: str, **headers: str) -> Any:
        """The JSON of an answer that must be 200."""
        async with self.http.get(path, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def events(self, path: str, **headers: str) -> list[dict[str, Any]]:
        """The events of a stream that ends."""
        async with self.http.get(path, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            return events_in(await answer.text())

    async def operate(self, path: str, **options: object) -> dict[str, Any]:
        """The last line of an operation."""
        async with self.http.post(path, json=options) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "application/x-ndjson"
            last: dict[str, Any] = json.loads((await answer.text()).splitlines()[-1])
            assert last["done"]
            return last


def events_in(text: str) -> list[dict[str, Any]]:
    """`id`, `event` and `data` of each event."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append({**fields, "data": json.loads(fields["data"])})
    return found


def scope_in(folder: Path) -> Scope:
    return Scope(ScopeKind.SYSTEM, folder / "etc", folder, folder, folder, folder, folder)


@asynccontextmanager
async def administered(
    folder: Path, serve: Engine, *, workers: int = 0, scope: Scope | None = None, **options: Any
) -> AsyncIterator[Administered]:
    """`scope`: whose configuration is shown, checked and added to; by default one without files, and without a registrar."""
    scope = scope or scope_in(folder)
    made: list[AdminApi] = []

    async def no_gpus() -> GpuProvider:
        raise AssertionError("nobody asks for GPUs")

    async def reload() -> dict[str, list[str]]:
        return {"changed": ["m"], "added": [], "removed": [], "problems": []}

    def routes(dispatcher: Dispatcher, servers: list[ApplicationServer], staff: Staff | None) -> list[web.RouteDef]:
        memory = Memory(no_gpus, dispatcher.post)
        gauges = Gauges(dispatcher.scheduler.state.stand, dispatcher.post)
        snapshot = Snapshot(dispatcher, memory, gauges, scope="system")
        api = AdminApi(
            dispatcher,
            snapshot,
            PinBook(folder / "pins.json"),
            scope,
            reload,
            connections=lambda: [connection for server in servers for connection in server.connections],
            census=lambda: None if staff is None else staff.census,
            more=RegistryRoutes(dispatcher, snapshot, scope).routes(),
        )
        made.append(api)
        access = AdminAccess(lambda: dispatcher.config.gateway)  # as on the admin socket: everything is shown
        return [access.on_socket(api.definition(route)) for route in api.routes]

    async with (
        engine(folder / "engine.sock", serve) as endpoint,
        gateway(dict.fromkeys(NAMES, endpoint), workers=workers, more_routes=routes, **options) as running,
        aiohttp.ClientSession(f"http://127.0.0.1:{running.port}") as http,
    ):
        try:
            yield Administered(running, made[0], http)
        finally:
            made[0].end_streams()
            await asyncio.sleep(0)


def with_admin(folder: Path, serve: Engine, body: Callable[[Administered], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run `body` with a gateway."""

    async def run() -> None:
        async with administered(folder, serve, **options) as found:
            await body(found)

    asyncio.run(run())
