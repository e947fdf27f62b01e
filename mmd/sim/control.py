"""vLLM's control routes: health, models, sleep and wake. They answer whether the engine sleeps or not."""

import asyncio
import json
import time

from aiohttp import web

from mmd import __version__
from mmd.sim.call import ENGINE, json_body
from mmd.sim.errors import BadRequestError

__all__ = ["ROUTES"]


async def _health(request: web.Request) -> web.Response:
    return web.Response(status=200 if await request.app[ENGINE].health() else 503)


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": __version__})


async def _metrics(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    label = json.dumps(engine.options.model, ensure_ascii=False)
    lines = ("# TYPE vllm:num_requests_running gauge", f"vllm:num_requests_running{{model_name={label}}} {engine.in_flight}")
    return web.Response(text="\n".join((*lines, "")))


async def _models(request: web.Request) -> web.Response:
    """The engine's own name, and its adapters, whose `parent` it is."""
    options = request.app[ENGINE].options
    base = {"object": "model", "created": int(time.time()), "owned_by": "mmd"}
    own = base | {"id": options.model, "root": options.model, "parent": None}
    adapters = [base | {"id": name, "root": path, "parent": options.model} for name, path in options.lora.items()]
    return web.json_response({"object": "list", "data": [own, *adapters]})


async def _sleep(request: web.Request) -> web.Response:
    level, mode = request.query.get("level", "1"), request.query.get("mode", "abort")
    if level not in {"0", "1", "2"} or mode not in {"abort", "wait", "keep"}:
        raise BadRequestError(f"level must be 0, 1 or 2 and mode abort, wait or keep, not {level} and {mode}")
    # Shielded, because the real one cannot be called off either: a caller that gives up waiting does not cancel the sleep.
    await asyncio.shield(asyncio.ensure_future(request.app[ENGINE].sleep(int(level), mode)))
    return web.json_response({"status": "sleeping", "level": int(level)})


async def _wake_up(request: web.Request) -> web.Response:
    tags = request.query.getall("tags", [])
    awake = await asyncio.shield(asyncio.ensure_future(request.app[ENGINE].wake(tags)))
    return web.json_response({"status": "awake" if awake else "sleeping", "tags": tags or None})


async def _is_sleeping(request: web.Request) -> web.Response:
    return web.json_response({"is_sleeping": request.app[ENGINE].is_sleeping})


async def _collective_rpc(request: web.Request) -> web.Response:
    method = (await json_body(request)).get("method")
    if method != "reload_weights":
        raise BadRequestError(f"method {method!r} is not simulated")
    request.app[ENGINE].reload_weights()
    return web.json_response({"results": [None]})


ROUTES = (
    web.get("/health", _health),
    web.get("/version", _version),
    web.get("/metrics", _metrics),
    web.get("/v1/models", _models),
    web.post("/sleep", _sleep),
    web.post("/wake_up", _wake_up),
    web.get("/is_sleeping", _is_sleeping),
    web.post("/collective_rpc", _collective_rpc),
)
