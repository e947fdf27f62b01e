"""The HTTP API of a simulated engine: the routes of vLLM, OpenAI, Anthropic and llama.cpp, errors in vLLM's shape."""

import importlib
from collections.abc import Awaitable, Callable

from aiohttp import web

from mmd.sim import chat, control
from mmd.sim.call import ENGINE, MAX_BODY_BYTES, STATES
from mmd.sim.engine import Engine
from mmd.sim.errors import ApiError, error_answer

__all__ = ["RARE", "make_app"]

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RARE = (
    ("POST", "/v1/responses", "responses", "create"),
    ("GET", "/v1/responses/{id}", "responses", "retrieve"),
    ("DELETE", "/v1/responses/{id}", "responses", "delete"),
    ("POST", "/v1/responses/{id}/cancel", "responses", "cancel"),
    ("POST", "/v1/messages", "messages", "messages"),
    ("POST", "/v1/messages/count_tokens", "messages", "count_tokens"),
    ("POST", "/v1/embeddings", "pooling", "embeddings"),
    ("POST", "/pooling", "pooling", "pooling"),
    ("POST", "/classify", "pooling", "classify"),
    ("POST", "/score", "pooling", "score"),
    ("POST", "/v1/score", "pooling", "score"),
    # vLLM's, Jina's, Cohere's and llama.cpp's names of the same
    ("POST", "/rerank", "pooling", "rerank"),
    ("POST", "/v1/rerank", "pooling", "rerank"),
    ("POST", "/v2/rerank", "pooling", "rerank"),
    ("POST", "/reranking", "pooling", "rerank"),
    ("POST", "/v1/reranking", "pooling", "rerank"),
    ("POST", "/tokenize", "tokens", "tokenize"),
    ("POST", "/detokenize", "tokens", "detokenize"),
    ("POST", "/v1/audio/speech", "audio", "speech"),
    ("POST", "/v1/audio/transcriptions", "audio", "transcriptions"),
    ("POST", "/v1/audio/translations", "audio", "translations"),
    ("GET", "/v1/audio/voices", "audio", "voices"),
    ("POST", "/v1/images/generations", "images", "generations"),
    ("POST", "/v1/images/edits", "images", "edits"),
    ("POST", "/sdapi/v1/txt2img", "images", "text_to_image"),
    ("POST", "/sdapi/v1/img2img", "images", "image_to_image"),
    ("POST", "/completion", "llama_cpp", "completion"),
    ("POST", "/infill", "llama_cpp", "infill"),
    ("GET", "/props", "llama_cpp", "props"),
    ("GET", "/v1/realtime", "realtime", "realtime"),
)
"""Method, path, module and function. The first request for one imports its module, so that an engine starts quickly."""


def make_app(engine: Engine) -> web.Application:
    """The application; it answers `/health` with 200 only after `engine.load()`."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors])
    app[ENGINE] = engine
    app[STATES] = {}
    app.on_shutdown.append(_close)
    app.add_routes((*control.ROUTES, *chat.ROUTES))
    for method, path, module, function in RARE:
        app.router.add_route(method, path, _imported(module, function))
    return app


def _imported(module: str, function: str) -> _Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        handler: _Handler = getattr(importlib.import_module(f"mmd.sim.{module}"), function)
        return await handler(request)

    return handle


async def _close(app: web.Application) -> None:
    for state in app[STATES].values():
        await state.close()


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error_answer(error, anthropic=request.path.startswith("/v1/messages"))
    except web.HTTPNotFound:
        return web.json_response({"detail": "Not Found"}, status=404)
    except web.HTTPMethodNotAllowed:
        return web.json_response({"detail": "Method Not Allowed"}, status=405)
