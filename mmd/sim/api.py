"""The HTTP API of a simulated engine: OpenAI's inference routes and vLLM's control routes, errors in vLLM's shape."""

import asyncio
import base64
import json
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from mmd import __version__
from mmd.sim.engine import Engine, RefusedError
from mmd.sim.generate import BadRequestError, Job, chat_job, completion_jobs, generate, responses_job
from mmd.sim.responses import response_events
from mmd.sim.text import count_tokens, embedding

__all__ = ["make_app"]

_ENGINE = web.AppKey("engine", Engine)
_DIMENSIONS = 64
_MAX_BODY_BYTES = 64 << 20

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Events = AsyncIterator[Mapping[str, Any]]


def make_app(engine: Engine) -> web.Application:
    """The application; it answers `/health` with 200 only after `engine.load()`."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors])
    app[_ENGINE] = engine
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/version", _version),
            web.get("/metrics", _metrics),
            web.get("/v1/models", _models),
            web.post("/v1/chat/completions", _chat),
            web.post("/v1/completions", _completions),
            web.post("/v1/embeddings", _embeddings),
            web.post("/v1/responses", _responses),
            web.post("/sleep", _sleep),
            web.post("/wake_up", _wake_up),
            web.get("/is_sleeping", _is_sleeping),
            web.post("/collective_rpc", _collective_rpc),
        ]
    )
    return app


def _error(status: int, kind: str, message: str, *, param: str | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status)


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except BadRequestError as error:
        return _error(400, "BadRequestError", str(error))
    except RefusedError as error:
        return _error(500, "InternalServerError", str(error))
    except web.HTTPNotFound:
        return web.json_response({"detail": "Not Found"}, status=404)
    except web.HTTPMethodNotAllowed:
        return web.json_response({"detail": "Method Not Allowed"}, status=405)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise BadRequestError(f"JSON decode error: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


@asynccontextmanager
async def _inference(request: web.Request) -> AsyncIterator[tuple[Engine, dict[str, Any], web.Response | None]]:
    """One inference request: the engine, the body, and the answer if it is an error already."""
    engine, body = request.app[_ENGINE], await _body(request)
    model = body.get("model") or engine.options.model
    if model != engine.options.model:
        yield engine, body, _error(404, "NotFoundError", f"The model `{model}` does not exist.", param="model")
        return
    async with engine.request():
        refused = engine.options.faults.refuse_warm_up and engine.served == 0
        yield engine, body, _error(500, "InternalServerError", "told to refuse the warm-up") if refused else None


async def _chat(request: web.Request) -> web.StreamResponse:
    async with _inference(request) as (engine, body, error):
        if error:
            return error
        job = chat_job(body)
        if body.get("stream"):
            return await _stream(request, _chunks(engine, [job], body, chat=True))
        text, reason, tokens = await _collect(engine, job)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": reason}
        return web.json_response(_envelope(engine, "chat.completion", [choice]) | {"usage": _usage(job.prompt_tokens, tokens)})


async def _completions(request: web.Request) -> web.StreamResponse:
    async with _inference(request) as (engine, body, error):
        if error:
            return error
        jobs = completion_jobs(body)
        if body.get("stream"):
            return await _stream(request, _chunks(engine, jobs, body, chat=False))
        results = await asyncio.gather(*(_collect(engine, job) for job in jobs))
        choices = [
            {"index": job.index, "text": text, "logprobs": None, "finish_reason": reason}
            for job, (text, reason, _) in zip(jobs, results, strict=True)
        ]
        usage = _usage(sum(job.prompt_tokens for job in jobs), sum(tokens for _, _, tokens in results))
        return web.json_response(_envelope(engine, "text_completion", choices) | {"usage": usage})


async def _responses(request: web.Request) -> web.StreamResponse:
    async with _inference(request) as (engine, body, error):
        if error:
            return error
        events = response_events(engine, responses_job(body))
        if body.get("stream"):
            return await _stream(request, events, done=False)
        last: Mapping[str, Any] = {}
        async for event in events:
            last = event
        return web.json_response(last["response"])


async def _embeddings(request: web.Request) -> web.StreamResponse:
    async with _inference(request) as (engine, body, error):
        if error:
            return error
        given = body.get("input")
        single = isinstance(given, str) or (isinstance(given, list) and all(isinstance(token, int) for token in given))
        texts = [str(item) for item in ([given] if single else given or ())]
        if not texts:
            raise BadRequestError("input: a string or a list is required")
        dimensions = body.get("dimensions") or _DIMENSIONS
        vectors = [embedding(text, dimensions) for text in texts]
        if body.get("encoding_format") == "base64":
            encoded: list[Any] = [base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode() for vector in vectors]
        else:
            encoded = vectors
        tokens = sum(map(count_tokens, texts))
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(encoded)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response({"object": "list", "model": engine.options.model, "data": data, "usage": usage})


async def _collect(engine: Engine, job: Job) -> tuple[str, str | None, int]:
    """The whole text, the finish reason, the number of tokens."""
    words: list[str] = []
    reason: str | None = None
    async for piece in generate(engine, job):
        if piece.finish_reason is None:
            words.append(piece.text)
        reason = piece.finish_reason
    return "".join(words), reason, len(words)


async def _chunks(engine: Engine, jobs: list[Job], body: Mapping[str, Any], *, chat: bool) -> _Events:
    """The chunks of a streamed answer, one prompt after the other, and the usage last when the client asked for it."""
    base = _envelope(engine, "chat.completion.chunk" if chat else "text_completion", [])
    tokens = 0
    for job in jobs:
        if chat:
            yield base | {"choices": [_delta(job, {"role": "assistant", "content": ""}, None)]}
        async for piece in generate(engine, job):
            tokens += piece.finish_reason is None
            if chat:
                choice = _delta(job, {"content": piece.text} if piece.finish_reason is None else {}, piece.finish_reason)
            else:
                choice = {"index": job.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}
            yield base | {"choices": [choice]}
    if (body.get("stream_options") or {}).get("include_usage"):
        yield base | {"usage": _usage(sum(job.prompt_tokens for job in jobs), tokens)}


def _delta(job: Job, delta: Mapping[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": job.index, "delta": delta, "logprobs": None, "finish_reason": reason}


async def _stream(request: web.Request, events: _Events, *, done: bool = True) -> web.StreamResponse:
    """Server-sent events; named when they have a `type` (the Responses API), ended by [DONE] otherwise."""
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
    await answer.prepare(request)
    async for event in events:
        name = f"event: {event['type']}\n" if "type" in event else ""
        await answer.write(f"{name}data: {json.dumps(event)}\n\n".encode())
    if done:
        await answer.write(b"data: [DONE]\n\n")
    await answer.write_eof()
    return answer


def _envelope(engine: Engine, kind: str, choices: list[Any]) -> dict[str, Any]:
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    name = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": engine.options.model, "choices": choices}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _health(request: web.Request) -> web.Response:
    return web.Response(status=200 if await request.app[_ENGINE].health() else 503)


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": __version__})


async def _metrics(request: web.Request) -> web.Response:
    engine = request.app[_ENGINE]
    label = json.dumps(engine.options.model, ensure_ascii=False)
    lines = ("# TYPE vllm:num_requests_running gauge", f"vllm:num_requests_running{{model_name={label}}} {engine.in_flight}")
    return web.Response(text="\n".join((*lines, "")))


async def _models(request: web.Request) -> web.Response:
    card = {"id": request.app[_ENGINE].options.model, "object": "model", "created": int(time.time()), "owned_by": "mmd"}
    return web.json_response({"object": "list", "data": [card]})


async def _sleep(request: web.Request) -> web.Response:
    level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
    if level not in {"0", "1", "2"} or mode not in {"abort", "wait", "keep"}:
        raise BadRequestError(f"level must be 0, 1 or 2 and mode abort, wait or keep, not {level} and {mode}")
    # Shielded, because the real one cannot be called off either: a caller that gives up waiting does not cancel the sleep.
    await asyncio.shield(asyncio.ensure_future(request.app[_ENGINE].sleep(int(level), mode)))
    return web.json_response({"status": "sleeping", "level": int(level)})


async def _wake_up(request: web.Request) -> web.Response:
    tags = request.query.getall("tags", [])
    awake = await asyncio.shield(asyncio.ensure_future(request.app[_ENGINE].wake(tags)))
    return web.json_response({"status": "awake" if awake else "sleeping", "tags": tags or None})


async def _is_sleeping(request: web.Request) -> web.Response:
    return web.json_response({"is_sleeping": request.app[_ENGINE].is_sleeping})


async def _collective_rpc(request: web.Request) -> web.Response:
    method = (await _body(request)).get("method")
    if method != "reload_weights":
        raise BadRequestError(f"method {method!r} is not simulated")
    request.app[_ENGINE].reload_weights()
    return web.json_response({"results": [None]})
