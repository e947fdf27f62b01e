"""Anthropic's messages."""

import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from mmd.sim.call import Call, inference
from mmd.sim.events import send_events
from mmd.sim.generate import collect, generate
from mmd.sim.jobs import Job, messages_job, prompt_tokens

__all__ = ["count_tokens", "messages"]

_REASONS = {"stop": "end_turn", "length": "max_tokens"}
"""Anthropic's names. It has none for an abort."""


async def messages(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    async with inference(request) as call:
        job = messages_job(call.body, call.model)
        if call.body.get("stream"):
            return await send_events(request, _events(call, job))
        (result,) = await collect(call.engine, [job])
        message = _message(job) | _end(result.finish_reason, result.stopped_by)
        usage = {"input_tokens": job.prompt_tokens, "output_tokens": result.tokens}
        return web.json_response(message | {"content": [{"type": "text", "text": result.text}], "usage": usage})


async def count_tokens(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages/count_tokens."""
    async with inference(request) as call:
        return web.json_response({"input_tokens": prompt_tokens(call.body)})


async def _events(call: Call, job: Job) -> AsyncIterator[Mapping[str, Any]]:
    """In Anthropic's order; the last usage is of the whole message."""
    tokens, end = 0, _end(None, None)
    yield {
        "type": "message_start",
        "message": _message(job) | {"usage": {"input_tokens": job.prompt_tokens, "output_tokens": 0}},
    }
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    yield {"type": "ping"}
    async for _, said in generate(call.engine, [job]):
        tokens += said.tokens
        end = _end(said.finish_reason, said.stopped_by)
        if said.text:
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": said.text}}
    yield {"type": "content_block_stop", "index": 0}
    usage = {"input_tokens": job.prompt_tokens, "output_tokens": tokens}
    yield {"type": "message_delta", "delta": end, "usage": usage}
    yield {"type": "message_stop"}


def _message(job: Job) -> dict[str, Any]:
    message = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": job.model, "content": []}
    return message | _end(None, None)


def _end(reason: str | None, stopped_by: str | None) -> dict[str, str | None]:
    return {"stop_reason": "stop_sequence" if stopped_by else _REASONS.get(reason or ""), "stop_sequence": stopped_by}
