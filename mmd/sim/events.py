"""Server-sent events, as OpenAI's and Anthropic's clients read them."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from mmd.sim.errors import ApiError, error_body

__all__ = ["Events", "send_events"]

Events = AsyncIterator[Mapping[str, Any]]


async def send_events(request: web.Request, events: Events, *, done: bool = False) -> web.StreamResponse:
    """Answer with `events`, named when they have a `type`; `done`: with [DONE] after them, where the API has that."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
    await answer.prepare(request)
    try:
        async for event in events:
            name = f"event: {event['type']}\n" if "type" in event else ""
            await answer.write(f"{name}data: {json.dumps(event)}\n\n".encode())
    except ApiError as error:  # too late for a status
        await answer.write(f"data: {json.dumps(error_body(error))}\n\n".encode())
    if done:
        await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer
