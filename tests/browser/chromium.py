"""Chromium without a driver: a page does its requests by itself, and reports to the server that it came from."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

__all__ = ["EVIL", "Pages", "served", "shown", "visit"]

EVIL = "evil.example"
"""A name that leads to 127.0.0.1 as the browser knows it, and that no machine knows for its own."""

_WITHIN_S = 40.0
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-popup-blocking", f"--host-resolver-rules=MAP {EVIL} 127.0.0.1"),
)


class Pages:
    """Serves a page, and hears what became of it."""

    def __init__(self, text: str) -> None:
        self.api_port = 0
        """Of the gateway: what PORT in the page stands for."""
        self.own_port = 0
        self.reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.seen: list[str] = []
        """Origins of what asked for /seen, which pages show without a script."""
        self._text = text

    async def page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._text.replace("PORT", str(self.api_port)), content_type="text/html")

    async def report(self, request: web.Request) -> web.Response:
        self.reports.put_nowait(await request.json())
        return web.Response()

    async def see(self, request: web.Request) -> web.Response:
        self.seen.append(request.headers.get("Origin", ""))
        return web.Response()

    async def count(self, _: web.Request) -> web.Response:
        return web.json_response(len(self.seen))


@asynccontextmanager
async def served(pages: Pages) -> AsyncIterator[int]:
    app = web.Application()
    app.add_routes([web.get("/", pages.page), web.post("/report", pages.report), web.get("/seen", pages.see)])
    app.add_routes([web.get("/seen/count", pages.count)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    pages.own_port = runner.addresses[0][1]
    try:
        yield pages.own_port
    finally:
        await runner.cleanup()


def _command(profile: Path, *arguments: str) -> tuple[str, ...]:
    """Chromium without a window. Its own sandbox needs another user than root."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium: tests/run --browser")
    profile.mkdir(exist_ok=True)
    return program, *_OPTIONS, f"--user-data-dir={profile}", *arguments


@asynccontextmanager
async def browser(profile: Path, url: str) -> AsyncIterator[None]:
    command = _command(profile, url)
    with (profile / "chromium.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it has crashed: its log tells
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def visit(pages: Pages, directory: Path, url: str) -> dict[str, Any]:
    """What a page that was fetched from `url` says."""
    async with browser(directory, url):
        try:
            async with asyncio.timeout(_WITHIN_S):
                return await pages.reports.get()
        except TimeoutError:
            pytest.fail((directory / "chromium.log").read_text(errors="replace"))


async def shown(directory: Path, url: str) -> str:
    """What somebody who has typed an address sees, as HTML."""
    command = _command(directory, "--dump-dom", url)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        async with asyncio.timeout(_WITHIN_S):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return out.decode()
