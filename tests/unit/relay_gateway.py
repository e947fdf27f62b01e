"""A gateway for tests of the relay: the real server, dispatcher and scheduler on real sockets, with engines that a test writes.

Only systemd is missing: the models of `models` are ready from the start, on sockets that the test listens on.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from aiohttp import web

from mmd.config import Config, EngineKind, Gateway, Model
from mmd.gateway.application import ApplicationServer
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.engine_client import EnginePool
from mmd.gateway.lesson_book import LessonBook
from mmd.gateway.lifecycle import Lifecycle
from mmd.gateway.openai import OpenAiApi
from mmd.gateway.relay.inference import Inference
from mmd.gateway.server import Door
from mmd.gateway.workers.staff import Staff
from mmd.keys import KeyRing
from mmd.names import CPU, UnitName, slug
from mmd.policy.actions import UnitAction
from mmd.policy.events import Done, Measured, Observed, Phase
from mmd.systemd.client import Systemd

__all__ = [
    "OK",
    "Connection",
    "Running",
    "Script",
    "body_of",
    "chat_bytes",
    "engine",
    "gateway",
    "in_step",
    "ok_answer",
    "outer_address",
    "read_answer",
    "read_request",
    "relay",
    "run",
    "until",
]

Engine = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

MoreRoutes = Callable[[Dispatcher, list[ApplicationServer], Staff | None], Iterable[web.RouteDef]]
"""Routes that need the gateway's parts; its server is among them later."""

default_workers = 0
"""Set by tests that run with and without."""

_LIMIT_S = 5.0
_POLL_S = 0.01


def outer_address() -> str:
    """An address of this machine that is not loopback: clients there have limits. A machine without any skips the test."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


class StaticLifecycle(Lifecycle):
    """Units whose engines listen where the test says; what the scheduler wants done is done at once."""

    def __init__(self, endpoints: Mapping[str, str]) -> None:
        self.engines = EnginePool()
        self.units = {}
        self.endpoints = dict(endpoints)
        self.actions: list[UnitAction] = []
        self.start_s = 0.0

    def endpoint(self, unit: UnitName) -> str | None:
        return self.endpoints.get(unit.id)

    async def perform(self, action: UnitAction) -> Done:
        self.actions.append(action)
        await asyncio.sleep(self.start_s)
        phase = Phase.STOPPED if type(action).__name__ == "Stop" else Phase.READY
        return Done(action, Observed(action.unit, phase), ok=True)

    async def measure(self, unit: UnitName) -> Measured | None:
        return None


class Running:
    """A gateway that serves."""

    def __init__(
        self,
        server: ApplicationServer,
        dispatcher: Dispatcher,
        lifecycle: StaticLifecycle,
        inference: Inference,
        staff: Staff | None,
        address: tuple[str, int],
    ) -> None:
        self.server = server
        self.staff = staff
        self.dispatcher = dispatcher
        self.lifecycle = lifecycle
        self.inference = inference
        self.host, self.port = address
        self.clients: list[Connection] = []

    async def use_keys(self, ring: KeyRing) -> None:
        """As the daemon does when mmdctl tells it of other keys."""
        self.inference.access.use(ring)
        if self.staff is not None:
            self.staff.tell_keys()
            await self.staff.keys_known()

    async def connect(self) -> "Connection":
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1 << 22)
        self.clients.append(Connection(reader, writer))
        return self.clients[-1]

    @property
    def handlers(self) -> list[object]:
        """Handlers of the application that have not ended."""
        application = self.server.application
        assert application is not None
        return list(application.connections)

    @property
    def relays(self) -> int:
        """Processes that relay."""
        return len(self.staff.pids) if self.staff is not None else 1

    @property
    def in_flight(self) -> int:
        self.dispatcher.survey()
        state = self.dispatcher.scheduler.state
        return len(state.admitted) + len(state.waiting) + sum(each.elsewhere for each in state.instances.values())

    async def leave(self, timeout_s: float) -> None:
        """As the daemon does when it stops."""
        if self.staff is not None:
            await self.staff.finish(timeout_s)
        await self.server.stop_accepting()
        await self.server.drain(timeout_s)


class Connection:
    """A client, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(_LIMIT_S):
            return await read_answer(self.reader, method)

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        await self.send(request)
        return await self.answer()

    async def rest(self) -> bytes:
        """Until the gateway closes."""
        async with asyncio.timeout(_LIMIT_S):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read()
        return b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    """Status, fields (lower case) and content of one answer; a truncated one raises IncompleteReadError."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    status = int(lines[0].split()[1])
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    if method == "HEAD" or status in (101, 204, 304):
        return status, fields, b""
    if fields.get("transfer-encoding") == "chunked":
        content = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            content += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
        return status, fields, content
    if "content-length" in fields:
        return status, fields, await reader.readexactly(int(fields["content-length"]))
    return status, fields, await reader.read()


def body_of(model: str, *, stream: bool = False) -> bytes:
    return b'{"model": "%b", "stream": %b, "messages": []}' % (model.encode(), b"true" if stream else b"false")


def chat_bytes(model: str = "m", *, stream: bool = False, more: bytes = b"", version: bytes = b"1.1", size: int = 0) -> bytes:
    """A valid chat request; `more`: further header lines; `size`: at least so many bytes of body."""
    body = body_of(model, stream=stream).ljust(size)
    head = b"POST /v1/chat/completions HTTP/%b\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (version, more, len(body))
    return head + body


@asynccontextmanager
async def engine(path: Path, serve: Engine) -> AsyncIterator[str]:
    """Something that listens on a Unix socket as an engine does; its endpoint."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        tasks.discard(task)

    server = await asyncio.start_unix_server(handle, path, limit=1 << 22)
    try:
        yield f"unix:{path}"
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def gateway(
    endpoints: Mapping[str, str],
    *,
    routes: tuple[web.RouteDef, ...] = (),
    settings: Gateway | None = None,
    ready: bool | Collection[str] = True,
    workers: int | None = None,
    concurrency: int = 0,
    queue_limit: int | None = None,
    models: tuple[Model, ...] = (),
    more_routes: MoreRoutes | None = None,
    keys: KeyRing | None = None,
    door: Door = Door.API,
    host: str = "127.0.0.1",
) -> AsyncIterator[Running]:
    """A gateway with one CPU model per endpoint; `ready`: whether they are, or which of them; `workers`: processes that relay
    instead of this one, if any; `host`: where it listens.

    `models`: these instead, with endpoints by unit id.
    """
    workers = default_workers if workers is None else workers
    if not models:
        models = tuple(
            Model(
                name,
                slug(name),
                EngineKind.SIM,
                gpus=0,
                aliases=(f"alias-of-{name}",),
                concurrency=concurrency,
                queue_limit=queue_limit,
                lora={f"adapter-of-{name}": "/"},
            )
            for name in endpoints
        )
        endpoints = {slug(name): endpoint for name, endpoint in endpoints.items()}
        ready = ready if isinstance(ready, bool) else [slug(name) for name in ready]
    lifecycle = StaticLifecycle(endpoints)
    book = LessonBook(Path(":memory:"))
    dispatcher = Dispatcher(lifecycle, cast("Systemd", None), book)
    settings = settings or Gateway()
    settings = settings._replace(hosts=("x", *settings.hosts))  # what most requests of the tests call it
    config = Config(gateway=settings, models={model.name: model for model in models})
    dispatcher.reconfigure(config, dict.fromkeys(config.models, "definition"), 1 << 40)
    for unit_id in (endpoints if ready else ()) if isinstance(ready, bool) else ready:
        dispatcher.post(Observed(UnitName(unit_id, CPU), Phase.READY, start_s=0.5))
    inference = Inference(dispatcher)
    inference.access.use(keys or KeyRing())
    with socket.create_server((host, 0)) as listening:
        staff = Staff(dispatcher, inference, "mmd-api", [listening]) if workers else None
        servers: list[ApplicationServer] = []
        more = more_routes(dispatcher, servers, staff) if more_routes is not None else ()
        all_routes = [*OpenAiApi(dispatcher).routes(), *routes, *more]
        own, elsewhere = ([], staff.give) if staff is not None else ([listening], None)
        server = ApplicationServer("mmd-api", inference, all_routes, own, elsewhere=elsewhere, door=door)
        servers.append(server)
        if staff is not None:
            staff.adopt = server.adopt
            await staff.prepare(workers)
            staff.accept()
        await server.start()
        running = Running(server, dispatcher, lifecycle, inference, staff, listening.getsockname())
        try:
            yield running
        finally:
            for client in running.clients:
                client.writer.transport.abort()
            await running.leave(0)
            await lifecycle.engines.close()
            await dispatcher.close()
            book.close()
            await asyncio.sleep(0.01)  # what was closed is gone after the next turns of the loop


OK = b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}'


def ok_answer(content: bytes = OK, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (
        more,
        len(content),
        content,
    )


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request as the gateway writes it: always with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    assert len(lines) == 1, head
    return head, await reader.readexactly(int(lines[0].split(b":")[1]))


class Script:
    """An engine that answers the first requests as told, piece by piece, and all later ones properly."""

    def __init__(self, *answers: bytes | tuple[bytes, ...], close: bool = False) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.lost = 0
        self._close = close

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.requests.append(await read_request(reader))
                scripted = bool(self.answers)
                answer = self.answers.pop(0) if scripted else ok_answer()
                for piece in (answer,) if isinstance(answer, bytes) else answer:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.005)
                if scripted and self._close:
                    return
        finally:
            self.lost += 1


@asynccontextmanager
async def relay(path: Path, serve: Engine, **options: Any) -> AsyncIterator[Running]:
    async with engine(path / "engine.sock", serve) as endpoint, gateway({"m": endpoint}, **options) as running:
        yield running


def run(work: Coroutine[Any, Any, None]) -> None:
    uvloop.run(work)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - polled, for want of an event
            await asyncio.sleep(_POLL_S)


async def in_step(running: Running, connection: Connection | None = None) -> None:
    """A request on this connection, or on a new one, gets its own answer, and nothing is left behind."""
    used = connection or await running.connect()
    status, _, content = await used.ask(chat_bytes())
    assert (status, content) == (200, OK)
    status, _, content = await used.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, json.loads(content)) == (200, {"status": "ok"})
    await used.close()
    await until(lambda: running.in_flight == 0)
