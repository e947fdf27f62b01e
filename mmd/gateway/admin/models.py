"""Models: shown, and operated on.

Operations answer with newline-delimited JSON: progress as it happens, and one last line with the outcome
(`mmd.status.Progress`). A client that goes away only stops watching; what has begun goes on.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Final, Literal, NamedTuple

import msgspec
from aiohttp import web

from mmd.answers import Models
from mmd.config import EngineKind, Model
from mmd.errors import MmdError
from mmd.gateway.admin.route import ApiResponse, Body, Route, as_json, sees_all
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.operations import Operations, Options
from mmd.gateway.snapshot import Snapshot
from mmd.status import ModelStatus, Progress

__all__ = ["ModelRoutes"]

_MODEL: Final = "/api/v1/models/{name}"

_Operation = Callable[[Model, Options], AsyncIterator[Progress]]


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """There are none."""


class StopOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    force: bool = False
    """Do not wait for requests in flight."""


class SleepOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal[1, 2] | None = None
    """1: weights to host memory, 2: dropped; null: the model's own."""
    force: bool = False


class _Verb(NamedTuple):
    """An operation as a route."""

    name: str
    operation: _Operation
    summary: str
    options: type[msgspec.Struct] = NoOptions
    errors: tuple[int, ...] = ()


class ModelRoutes:
    def __init__(self, dispatcher: Dispatcher, snapshot: Snapshot, operations: Operations) -> None:
        self._dispatcher = dispatcher
        self._snapshot = snapshot
        self._verbs = (
            _Verb("start", operations.start, "Start it, or wake it, after making room"),
            _Verb("wake", operations.start, "The same as start"),
            _Verb("stop", operations.stop, "Stop it, when its requests are answered", StopOptions),
            _Verb("restart", operations.restart, "Stop it, and start it again", StopOptions),
            _Verb("sleep", operations.sleep, "Put it to sleep, when its requests are answered", SleepOptions),
            _Verb("verify", operations.verify, "Try a model that is pending: start it once, in memory that is free"),
            _Verb("reset", operations.reset, "Forget its failures, and what was learned of it"),
            _Verb("pin", operations.pin, "Let it make room for no other model, from now on"),
            _Verb("unpin", operations.unpin, "Let it make room for others, from now on"),
        )

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/api/v1/models", self.list, "All models", ApiResponse("The models, as configured.", Models)),
            Route("GET", _MODEL, self.show, "One model", ApiResponse("The model.", ModelStatus), errors=(404,)),
            *map(self._route, self._verbs),
        ]

    def _route(self, verb: _Verb) -> Route:
        return Route(
            "POST",
            f"{_MODEL}/{verb.name}",
            partial(self.operate, verb),
            verb.summary,
            ApiResponse("A line of JSON for each step, the last one with `done` true.", Progress, "application/x-ndjson"),
            body=Body("Options.", verb.options),
            errors=(404, 409, 413, 415, 503),
        )

    async def list(self, _: web.Request) -> web.Response:
        status = self._snapshot.status()
        return as_json(Models((status if sees_all() else status.without_private()).models))

    async def show(self, request: web.Request) -> web.Response:
        model = self._snapshot.model(self._model(request))
        return as_json(model if sees_all() else model.without_private())

    async def operate(self, verb: _Verb, request: web.Request) -> web.StreamResponse:
        """Run one operation on one model and stream how it goes."""
        model = self._model(request)
        if model.engine is EngineKind.EXTERNAL:
            message = f"{model.name} is somebody else's server at {model.endpoint}: mmd only routes to it"
            raise ApiError(409, message, code="external_model")
        options = await _options(request, verb)
        lines: asyncio.Queue[Progress | ApiError | None] = asyncio.Queue()
        # A task of its own: a client that goes away cancels this handler, but not what it has asked for.
        self._dispatcher.spawn(_run(verb.operation(model, options), lines))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache"})
        begun = time.monotonic()
        while (line := await lines.get()) is not None:
            if isinstance(line, ApiError):
                if not response.prepared:
                    raise line
                line = Progress(model.name, self._snapshot.model(model).state, line.message, done=True, ok=False)
            if not response.prepared:
                await response.prepare(request)
            told = line.to_json() | {"elapsed_s": round(time.monotonic() - begun, 3)}
            await response.write(json.dumps(told).encode() + b"\n")
        await response.write_eof()
        return response

    def _model(self, request: web.Request) -> Model:
        name = request.match_info["name"]
        config = self._dispatcher.config
        model = config.resolve(name) or next((m for m in config.models.values() if m.id == name), None)
        if model is None:
            raise no_such_model(name, config)
        return model


async def _run(operation: AsyncIterator[Progress], lines: "asyncio.Queue[Progress | ApiError | None]") -> None:
    """Carry an operation through, telling whoever still listens."""
    try:
        async for progress in operation:
            lines.put_nowait(progress)
    except ApiError as error:
        lines.put_nowait(error)
    except MmdError as error:
        lines.put_nowait(ApiError(503, str(error), code="failed"))
    except Exception:
        lines.put_nowait(ApiError(500, "internal error; see journalctl -u mmd-gateway", code="internal_error"))
        raise
    finally:
        lines.put_nowait(None)


async def _options(request: web.Request, verb: _Verb) -> Options:
    """The JSON body of an operation; ApiError for anything that it does not take."""
    text = await request.read()
    if not text:
        return {}
    if "Content-Type" in request.headers and request.content_type != "application/json":
        message = f"options are JSON, not {request.content_type}: Content-Type: application/json"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        options = msgspec.json.decode(text, type=verb.options)
    except msgspec.ValidationError as error:
        raise ApiError(400, f"{verb.name} does not take this: {error}", code="bad_option") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    return {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
