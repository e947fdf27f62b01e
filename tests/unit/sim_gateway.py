"""A gateway with simulated engines behind it, for real clients: it serves in a thread, so that tests and clients may block.

`org/model` is an engine with adapters, `filtered` one whose requests are changed, `program` a command that is no engine of
ours, `there` somebody else's server (in fact the first engine once more), `echo` an engine that answers whatever it is asked
for with the request itself.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from aiohttp import web
from relay_gateway import Running, gateway

from mmd.config import EngineKind, Filters, Gateway, Model
from mmd.sim.api import make_app
from mmd.sim.engine import Engine
from mmd.sim.options import parse

__all__ = ["SimGateway", "serving"]

T = TypeVar("T")

_LORA = {"sql": "/srv/sql", "org/xml": "/srv/xml"}
_FILTERS = Filters(strip=("stop", "absent"), set={"max_tokens": 3, "metadata": {"ü": ["é", None, {"a": 1}]}})


class SimGateway:
    """What a test sees of it."""

    def __init__(self, running: Running, engines: dict[str, Engine]) -> None:
        self.running = running
        self.engines = engines
        """Simulated engines by unit id."""
        self.url = f"http://127.0.0.1:{running.port}"
        self._loop = asyncio.get_running_loop()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it where the gateway runs."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)


async def echo(request: web.Request) -> web.StreamResponse:
    """What arrived; a place, or a WebSocket that says everything twice, where the path asks for it."""
    if request.headers.get("Upgrade") == "websocket":
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(2 * str(message.data))
        return socket
    if request.path == "/moved":
        raise web.HTTPFound(request.query["to"])
    told = {"method": request.method, "target": request.raw_path, "body": (await request.read()).decode("latin-1")}
    return web.json_response(told)


async def _serve(opened: AsyncExitStack, app: web.Application, path: Path) -> str:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    opened.push_async_callback(runner.cleanup)
    await web.UnixSite(runner, str(path)).start()
    return f"unix:{path}"


async def _simulate(opened: AsyncExitStack, folder: Path, unit: str, model: str, *more: str) -> tuple[Engine, str]:
    words = ["--model", model, "--socket", str(folder / f"{unit}.sock"), "--load-time", "0", "--wake-time", "0.01"]
    engine = Engine(parse([*words, "--tokens-per-second", "2000", "--sim-dir", str(folder / "sim"), *more]))
    await engine.load()
    return engine, await _serve(opened, make_app(engine), folder / f"{unit}.sock")


@asynccontextmanager
async def _gateway(folder: Path, workers: int) -> AsyncIterator[SimGateway]:
    async with AsyncExitStack() as opened:
        lora = [word for name, path in _LORA.items() for word in ("--lora", f"{name}={path}")]
        org, org_endpoint = await _simulate(opened, folder, "org", "org/model", *lora)
        filtered, filtered_endpoint = await _simulate(opened, folder, "filtered", "filtered")
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", echo)
        endpoints = {
            "org": org_endpoint,
            "filtered": filtered_endpoint,
            "echo": await _serve(opened, app, folder / "echo.sock"),
        }
        endpoints["program"] = endpoints["echo"]
        models = (
            Model("org/model", "org", EngineKind.SIM, gpus=0, aliases=("short", "gpt-4o"), lora=_LORA),
            Model("filtered", "filtered", EngineKind.SIM, gpus=0, filters=_FILTERS),
            Model("echo", "echo", EngineKind.SIM, gpus=0, lora={"loud": "/srv/loud"}, aliases=("murmur",), filters=_FILTERS),
            Model("program", "program", EngineKind.COMMAND, gpus=0),
            Model("there", "there", EngineKind.EXTERNAL, model="org/model", endpoint=org_endpoint),
            Model("stopped", "stopped", EngineKind.SIM, gpus=0),
        )
        settings = Gateway(loading_keepalive_s=0.05)
        running = await opened.enter_async_context(gateway(endpoints, models=models, workers=workers, settings=settings))
        yield SimGateway(running, {"org": org, "filtered": filtered})


@contextmanager
def serving(folder: Path, *, workers: int) -> Iterator[SimGateway]:
    """Everything, with this many relaying processes besides the one that decides."""
    begun: list[SimGateway] = []
    ready, over = threading.Event(), asyncio.Event()
    failure: list[BaseException] = []

    async def serve() -> None:
        async with _gateway(folder, workers) as found:
            begun.append(found)
            ready.set()
            await over.wait()

    def run() -> None:
        try:
            uvloop.run(serve())
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    try:
        if failure:
            raise failure[0]
        yield begun[0]
    finally:
        if begun:
            begun[0]._loop.call_soon_threadsafe(over.set)
        thread.join(30)
    if failure:
        raise failure[0]
