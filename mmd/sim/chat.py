"""OpenAI's chat completions and completions."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from mmd.sim.call import Call, inference
from mmd.sim.events import send_events
from mmd.sim.generate import Completion, collect, generate
from mmd.sim.jobs import Job, chat_jobs, choices, completion_jobs

__all__ = ["ROUTES"]


async def _chat(request: web.Request) -> web.StreamResponse:
    async with inference(request) as call:
        jobs = chat_jobs(call.body, call.model)
        if call.body.get("stream"):
            return await send_events(request, _chat_chunks(call, jobs), done=True)
        results = await collect(call.engine, jobs)
        answers = [
            {"index": job.choice, "message": {"role": "assistant", "content": result.text}, "logprobs": None}
            | _end(result.finish_reason, result.stopped_by)
            for job, result in zip(jobs, results, strict=True)
        ]
        usage = _usage(jobs[0].prompt_tokens, sum(result.tokens for result in results))
        return web.json_response(_envelope(call, "chat.completion") | {"choices": answers, "usage": usage})


async def _completions(request: web.Request) -> web.StreamResponse:
    async with inference(request) as call:
        jobs = completion_jobs(call.body, call.model)
        if call.body.get("stream"):
            return await send_events(request, _text_chunks(call, jobs), done=True)
        results = await collect(call.engine, jobs)
        answers = [
            {"index": job.choice, "text": result.text, "logprobs": None} | _end(result.finish_reason, result.stopped_by)
            for job, result in zip(jobs, results, strict=True)
        ]
        usage = _usage(_prompt_tokens(call.body, jobs), sum(result.tokens for result in results))
        return web.json_response(_envelope(call, "text_completion") | {"choices": answers, "usage": usage})


async def _chat_chunks(call: Call, jobs: Sequence[Job]) -> AsyncIterator[Mapping[str, Any]]:
    base, tokens = _envelope(call, "chat.completion.chunk"), 0
    for job in jobs:
        first = {"index": job.choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield base | {"choices": [first]}
    async for job, said in generate(call.engine, jobs):
        tokens += said.tokens
        if _is_news(said):
            delta = {"content": said.text} if said.text else {}
            choice = {"index": job.choice, "delta": delta, "logprobs": None} | _end(said.finish_reason, said.stopped_by)
            yield base | {"choices": [choice]}
    if _wants_usage(call.body):
        yield base | {"choices": [], "usage": _usage(jobs[0].prompt_tokens, tokens)}


async def _text_chunks(call: Call, jobs: Sequence[Job]) -> AsyncIterator[Mapping[str, Any]]:
    base, tokens = _envelope(call, "text_completion"), 0
    async for job, said in generate(call.engine, jobs):
        tokens += said.tokens
        if _is_news(said):
            choice = {"index": job.choice, "text": said.text, "logprobs": None} | _end(said.finish_reason, said.stopped_by)
            yield base | {"choices": [choice]}
    if _wants_usage(call.body):
        yield base | {"choices": [], "usage": _usage(_prompt_tokens(call.body, jobs), tokens)}


def _is_news(said: Completion) -> bool:
    """False for a token that is held back because it may begin a stop sequence."""
    return bool(said.text or said.finish_reason)


def _end(reason: str | None, stopped_by: str | None) -> dict[str, str | None]:
    """How a choice ended; `stop_reason` is vLLM's."""
    return {"finish_reason": reason, "stop_reason": stopped_by}


def _prompt_tokens(body: Mapping[str, Any], jobs: Sequence[Job]) -> int:
    """Each prompt counts once, however many choices there are of it."""
    return sum(job.prompt_tokens for job in jobs[:: choices(body)])


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _envelope(call: Call, kind: str) -> dict[str, Any]:
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": call.model}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


ROUTES = (web.post("/v1/chat/completions", _chat), web.post("/v1/completions", _completions))
