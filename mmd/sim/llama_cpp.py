"""llama.cpp's own routes: completion, infill, props (its server's README)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from aiohttp import web

from mmd import __version__
from mmd.sim.call import ENGINE, Call, inference, model_of
from mmd.sim.errors import BadRequestError
from mmd.sim.events import send_events
from mmd.sim.generate import collect, generate
from mmd.sim.jobs import Job, completion_jobs
from mmd.sim.text import CONTEXT_TOKENS

__all__ = ["completion", "infill", "props"]

_STOP_TYPES = {"stop": "eos", "length": "limit"}


async def completion(request: web.Request) -> web.StreamResponse:
    """POST /completion."""
    async with inference(request) as call:
        return await _answer(request, call, call.body)


async def infill(request: web.Request) -> web.StreamResponse:
    """POST /infill."""
    async with inference(request) as call:
        around = [call.body.get(name) for name in ("input_prefix", "input_suffix")]
        if not all(isinstance(text, str) for text in around):
            raise BadRequestError("input_prefix and input_suffix: strings are required", param="input_prefix")
        middle = call.body.get("prompt", "")
        if not isinstance(middle, str):
            raise BadRequestError("prompt: expected a string", param="prompt")
        return await _answer(request, call, {**call.body, "prompt": " ".join(filter(None, (*map(str, around), middle)))})


async def _answer(request: web.Request, call: Call, body: Mapping[str, Any]) -> web.StreamResponse:
    """Several prompts are answered by a list."""
    jobs = completion_jobs(_limits(body), call.model, limit="n_predict", default=None)
    if body.get("stream"):
        return await send_events(request, _events(call, jobs))
    results = await collect(call.engine, jobs)
    answers = [
        _final(call, job, result.text, result.tokens, result.finish_reason, result.stopped_by)
        for job, result in zip(jobs, results, strict=True)
    ]
    return web.json_response(answers if len(answers) > 1 else answers[0])


async def _events(call: Call, jobs: Sequence[Job]) -> AsyncIterator[Mapping[str, Any]]:
    tokens = {job.choice: 0 for job in jobs}
    async for job, said in generate(call.engine, jobs):
        tokens[job.choice] += said.tokens
        if said.text:
            yield {"index": job.choice, "content": said.text, "tokens": [], "stop": False}
        if said.finish_reason:
            yield _final(call, job, "", tokens[job.choice], said.finish_reason, said.stopped_by)


def _final(call: Call, job: Job, text: str, tokens: int, reason: str | None, stopped_by: str | None) -> dict[str, Any]:
    rate = call.engine.options.tokens_per_second
    settings = {"n_ctx": CONTEXT_TOKENS, "n_predict": -1 if job.max_tokens is None else job.max_tokens, "stop": list(job.stop)}
    return {
        "index": job.choice,
        "content": text,
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": job.model,
        "tokens_predicted": tokens,
        "tokens_evaluated": job.prompt_tokens,
        "tokens_cached": job.prompt_tokens + tokens,
        "generation_settings": settings,
        "prompt": job.prompt,
        "truncated": False,
        "stop_type": "word" if stopped_by else _STOP_TYPES.get(reason or "", "none"),
        "stopping_word": stopped_by or "",
        "timings": {
            "prompt_n": job.prompt_tokens,
            "prompt_ms": 0.0,
            "predicted_n": tokens,
            "predicted_ms": 1000 * tokens / rate if rate else 0.0,
            "predicted_per_second": rate,
        },
    }


def _limits(body: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's -1 means: until the answer ends by itself."""
    return {**body, "n_predict": None if body.get("n_predict") == -1 else body.get("n_predict")}


async def props(request: web.Request) -> web.StreamResponse:
    """GET /props."""
    # Tells of the sleep instead of waiting for its end, as llama.cpp's does: clients look at it all the time.
    engine = request.app[ENGINE]
    name = model_of(engine, request.query.get("model"))
    settings = {"n_ctx": CONTEXT_TOKENS, "params": {"n_predict": -1, "temperature": 0.0}}
    answer = {
        "default_generation_settings": settings,
        "total_slots": 1,
        "model_alias": name,
        "model_path": engine.options.lora.get(name, name),
        "chat_template": "",
        "modalities": {"vision": False, "audio": False},
        "build_info": f"mmd-sim {__version__}",
        "is_sleeping": engine.is_sleeping,
    }
    return web.json_response(answer)
