"""The OpenAI-compatible API: each request is routed by the `model` in its body, whatever its connection asked for before."""

import json
import logging
import time
from dataclasses import dataclass

from aiohttp import web

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher, Ticket
from mmd.gateway.relay import EngineGoneError, relay
from mmd.gateway.snapshot import model_state
from mmd.names import UnitName
from mmd.quantity import format_size

__all__ = ["INFERENCE_PATHS", "OpenAiApi"]

_log = logging.getLogger(__name__)

INFERENCE_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True, slots=True)
class _Call:
    """What routing needs of a request."""

    model: Model
    stream: bool
    body: bytes


class OpenAiApi:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._since = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            *(web.post(path, self.infer) for path in INFERENCE_PATHS),
            web.get("/v1/models", self.list_models),
            web.get("/v1/models/{name:.+}", self.get_model),
            web.get("/health", self.health),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """200 while the gateway accepts requests."""
        return web.json_response({"status": "ok"})

    async def list_models(self, _: web.Request) -> web.Response:
        models = [self._model_object(model) for model in self._dispatcher.config.models.values()]
        return web.json_response({"object": "list", "data": models})

    async def get_model(self, request: web.Request) -> web.Response:
        model = _resolve(self._dispatcher.config, request.match_info["name"])
        return web.json_response(self._model_object(model))

    def _model_object(self, model: Model) -> dict[str, object]:
        """OpenAI's fields, and what else a client may want to show."""
        return {
            "id": model.name,
            "object": "model",
            "created": self._since,
            "owned_by": "mmd",
            "aliases": list(model.aliases),
            "description": model.description,
            "state": model_state(self._dispatcher.scheduler.state, model).value,
        }

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Route one inference request: wait for its model if need be, then relay it."""
        config = self._dispatcher.config
        call = _parse(await _read_body(request, config.gateway.max_body_bytes), config)
        begun, status = time.monotonic(), 499  # what nginx calls a client that has left
        try:
            response = await self._infer(request, call)
            status = response.status
        except ApiError as error:
            status = error.status
            raise
        finally:
            if config.gateway.request_log:
                elapsed_s = time.monotonic() - begun
                _log.info("%s %s %s %d %.3f s", request.method, request.path, call.model.name, status, elapsed_s)
        return response

    async def _infer(self, request: web.Request, call: _Call) -> web.StreamResponse:
        if call.model.engine is EngineKind.EXTERNAL:
            return await self._external(request, call)
        with self._dispatcher.request(call.model) as ticket:
            return await self._forward(request, call, ticket)

    async def _external(self, request: web.Request, call: _Call) -> web.StreamResponse:
        assert call.model.endpoint is not None
        engine = self._dispatcher.lifecycle.engines.client(call.model.endpoint)
        try:
            return await relay(request, engine, request.path_qs, call.body)
        except EngineGoneError as error:
            message = f"{call.model.name}: nobody answers at {call.model.endpoint} ({error})"
            raise ApiError(502, message, code="engine_unreachable", retry_after_s=5) from error

    async def _forward(self, request: web.Request, call: _Call, ticket: Ticket) -> web.StreamResponse:
        """Relay to the instance that the ticket is admitted to; an error on a stream that has begun becomes its last event."""
        waiting = _Waiting(request)
        try:
            return await self._relay(request, call, ticket, waiting)
        except ApiError as error:
            if waiting.stream is None:
                raise
            await waiting.stream.write(error.event())
            await waiting.stream.write_eof()
            return waiting.stream

    async def _relay(self, request: web.Request, call: _Call, ticket: Ticket, waiting: "_Waiting") -> web.StreamResponse:
        """Relay; once more, to a restarted engine, if nobody listens at the first."""
        tries = 2 if call.model.restart_on_connection_failure else 1
        gone = ""
        for attempt in range(tries):
            if attempt:
                ticket.unreachable()
            unit = await self._admission(call, ticket, waiting)
            endpoint = self._dispatcher.lifecycle.endpoint(unit)
            if endpoint is None:
                gone = "its runner has left no report"
                continue
            engine = self._dispatcher.lifecycle.engines.client(endpoint)
            try:
                return await relay(request, engine, request.path_qs, call.body, begun=waiting.stream)
            except EngineGoneError as error:
                gone = str(error)
                _log.warning("%s: nobody answers: %s", unit, gone)
        message = f"{call.model.name}: nobody answers at its engine: {gone}"
        raise ApiError(502, message, code="engine_unreachable", retry_after_s=1)

    async def _admission(self, call: _Call, ticket: Ticket, waiting: "_Waiting") -> UnitName:
        """Wait for an instance. A client that asked for a stream gets its head, and comments, after a while."""
        patience_s = self._dispatcher.config.gateway.loading_keepalive_s if call.stream else None
        while (unit := await ticket.admitted(patience_s)) is None:
            state = model_state(self._dispatcher.scheduler.state, call.model)
            await waiting.comment(f"{call.model.name} is {state}")
        return unit


class _Waiting:
    """An event stream opened before there is anything to send, so that neither client nor proxy gives up meanwhile."""

    __slots__ = ("_request", "stream")

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.stream: web.StreamResponse | None = None

    async def comment(self, text: str) -> None:
        """Send an SSE comment, which clients skip (html.spec.whatwg.org, server-sent events)."""
        if self.stream is None:
            self.stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await self.stream.prepare(self._request)
        await self.stream.write(f": {text}\n\n".encode())


async def _read_body(request: web.Request, limit: int) -> bytes:
    """The whole body; ApiError 413 as soon as it is known to be larger than `limit` bytes."""
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {format_size(limit)} (gateway.max_body)", code="body_too_large")


def _parse(body: bytes, config: Config) -> _Call:
    """Find the model; ApiError 400 or 404 when the body does not name one that exists."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    name = payload.get("model")
    if not isinstance(name, str) or not name:
        raise ApiError(400, 'the body names no model: set "model"', code="model_required", param="model")
    model = _resolve(config, name)
    upstream = model.model if model.engine is EngineKind.EXTERNAL else model.name
    if name != upstream:
        payload["model"] = upstream
        body = json.dumps(payload).encode()
    return _Call(model, payload.get("stream") is True, body)


def _resolve(config: Config, name: str) -> Model:
    model = config.resolve(name)
    if model is None:
        raise no_such_model(name, config)
    return model
