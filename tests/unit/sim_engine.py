"""A simulated engine in the test's process, and real clients of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
from aiohttp import web

from mmd.sim.api import make_app
from mmd.sim.engine import Engine
from mmd.sim.options import parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}


class Clients:
    """An engine on a TCP port, and who asks it."""

    def __init__(self, engine: Engine, url: str, opened: AsyncExitStack) -> None:
        self.engine = engine
        self.http = aiohttp.ClientSession(url)
        self._url = url
        self._opened = opened
        opened.push_async_callback(self.http.close)

    @cached_property
    def openai(self) -> openai.AsyncOpenAI:
        client = openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="-", max_retries=0)
        self._opened.push_async_callback(client.close)
        return client

    @cached_property
    def anthropic(self) -> anthropic.AsyncAnthropic:
        client = anthropic.AsyncAnthropic(base_url=self._url, api_key="-", max_retries=0)
        self._opened.push_async_callback(client.close)
        return client


def arguments(directory: Path, *extra: str) -> list[str]:
    return [
        *("--model", "m", "--socket", str(directory / "engine.sock"), "--load-time", "0", "--wake-time", "0.01"),
        *("--tokens-per-second", "0", "--sim-dir", str(directory / "sim"), *extra),
    ]


@asynccontextmanager
async def serving(directory: Path, *extra: str) -> AsyncIterator[tuple[aiohttp.ClientSession, Engine]]:
    """An engine in this process, loaded, on a Unix socket, and a client of it."""
    engine = Engine(parse(arguments(directory, *extra)))
    await engine.load()
    runner = web.AppRunner(make_app(engine), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(directory / "engine.sock")).start()
    try:
        async with aiohttp.ClientSession("http://m", connector=aiohttp.UnixConnector(str(directory / "engine.sock"))) as client:
            yield client, engine
    finally:
        await runner.cleanup()


def with_engine(directory: Path, body: Callable[[aiohttp.ClientSession, Engine], Awaitable[None]], *extra: str) -> None:
    async def run() -> None:
        async with serving(directory, *extra) as (client, engine):
            await body(client, engine)

    asyncio.run(run())


def with_clients(directory: Path, body: Callable[[Clients], Awaitable[None]], *extra: str) -> None:
    """Run `body` with an engine that was started with the options `extra`, and every kind of client of it."""

    async def run() -> None:
        engine = Engine(parse(arguments(directory, *extra)))
        await engine.load()
        runner = web.AppRunner(make_app(engine), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with AsyncExitStack() as opened:
                await body(Clients(engine, url, opened))
        finally:
            await runner.cleanup()

    asyncio.run(run())


async def post(client: aiohttp.ClientSession, path: str, **json_body: object) -> Any:
    """The JSON of an answer that must be 200."""
    async with client.post(path, json=json_body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def get(client: aiohttp.ClientSession, path: str) -> Any:
    """The JSON of an answer that must be 200."""
    async with client.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  the engine has no event for what is asked
            await asyncio.sleep(0.01)


async def data_of(answer: aiohttp.ClientResponse) -> list[str]:
    return [line[6:].decode().strip() async for line in answer.content if line.startswith(b"data: ")]


async def events_of(answer: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    """The events of a stream that names each, in OpenAI's and Anthropic's way."""
    names, events = [], []
    async for line in answer.content:
        if line.startswith(b"event: "):
            names.append(line[7:].decode().strip())
        elif line.startswith(b"data: {"):
            events.append(json.loads(line[6:]))
    assert names == [event["type"] for event in events]
    return events
