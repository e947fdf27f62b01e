"""Server-sent events (html.spec.whatwg.org): what comes is sent on, with comments while nothing comes."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from aiohttp import web

from mmd.gateway.admin.route import EVENT_STREAM

__all__ = ["EventStream", "until"]

# Less than what proxies take for a dead connection.
_IDLE_S: Final = 15.0

_T = TypeVar("_T")


class EventStream:
    """An answer that is a stream of events."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, "Cache-Control": "no-cache"})

    async def open(self) -> None:
        await self._response.prepare(self._request)

    async def send(self, data: dict[str, Any], *, event: str = "", id_: str = "") -> None:
        lines = [*([f"id: {id_}"] if id_ else []), *([f"event: {event}"] if event else []), f"data: {json.dumps(data)}"]
        await self._response.write("\n".join([*lines, "", ""]).encode())

    async def keep_alive(self) -> None:
        await self._response.write(b": nothing new\n\n")

    async def close(self) -> web.StreamResponse:
        await self._response.write_eof()
        return self._response


async def until(closing: asyncio.Event, source: AsyncGenerator[_T, None]) -> AsyncGenerator[_T | None, None]:
    """What `source` gives, until it ends or `closing` is set; None when there was nothing for a while. It closes `source`."""
    over = asyncio.ensure_future(closing.wait())
    async with aclosing(source):
        coming: asyncio.Future[_T] | None = None
        try:
            while not over.done():
                coming = coming or asyncio.ensure_future(anext(source))
                await asyncio.wait((coming, over), timeout=_IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    found, coming = coming.result(), None
                    yield found
                elif not over.done():
                    yield None
        except StopAsyncIteration:
            return
        finally:
            over.cancel()
            if coming is not None:
                coming.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration):
                    await coming
