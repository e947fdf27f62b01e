"""The administration API under /api/v1: what mmdctl speaks, on /run/mmd/admin.sock.

Operations answer with newline-delimited JSON: progress as it happens, and one last line with the outcome
(`mmd.status.Progress`). A client that goes away only stops watching; what has begun goes on.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from mmd.config import EngineKind, Model
from mmd.errors import MmdError
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.operations import Operations, Options
from mmd.gateway.snapshot import Snapshot
from mmd.status import Progress

__all__ = ["AdminApi"]

_Operation = Callable[[Model, Options], AsyncIterator[Progress]]


class AdminApi:
    """`reload` reads the configuration again and answers what changed."""

    def __init__(
        self, dispatcher: Dispatcher, snapshot: Snapshot, reload: Callable[[], Awaitable[dict[str, list[str]]]]
    ) -> None:
        self._dispatcher = dispatcher
        self._snapshot = snapshot
        self._reload = reload
        operations = Operations(dispatcher, snapshot)
        self._operations: dict[str, _Operation] = {
            "start": operations.start,
            "wake": operations.start,
            "verify": operations.verify,
            "stop": operations.stop,
            "sleep": operations.sleep,
            "restart": operations.restart,
            "reset": operations.reset,
        }

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/v1/status", self.status),
            web.get("/api/v1/models/{name:.+}", self.show),
            web.post("/api/v1/models/{name:.+}/{operation}", self.operate),
            web.post("/api/v1/reload", self.reload),
        ]

    async def status(self, _: web.Request) -> web.Response:
        return web.json_response(self._snapshot.status().to_json())

    async def show(self, request: web.Request) -> web.Response:
        return web.json_response(self._snapshot.model(self._model(request)).to_json())

    async def reload(self, _: web.Request) -> web.Response:
        return web.json_response(await self._reload())

    async def operate(self, request: web.Request) -> web.StreamResponse:
        """Run one operation on one model and stream how it goes."""
        name = request.match_info["operation"]
        operation = self._operations.get(name)
        if operation is None:
            known = ", ".join(sorted(self._operations))
            raise ApiError(404, f"there is no operation {name!r}; there are {known}", code="no_such_operation")
        model = self._model(request)
        if model.engine is EngineKind.EXTERNAL:
            message = f"{model.name} is somebody else's server at {model.endpoint}: mmd only routes to it"
            raise ApiError(409, message, code="external_model")
        options = await _options(request, name)
        lines: asyncio.Queue[Progress | ApiError | None] = asyncio.Queue()
        # A task of its own: a client that goes away cancels this handler, but not what it has asked for.
        self._dispatcher.spawn(_run(operation(model, options), lines))
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


_OPTIONS = {"sleep": {"level", "force"}, "stop": {"force"}, "restart": {"force"}}


async def _run(operation: AsyncIterator[Progress], lines: "asyncio.Queue[Progress | ApiError | None]") -> None:
    """Carry an operation through, telling whoever still listens."""
    try:
        async for progress in operation:
            lines.put_nowait(progress)
    except ApiError as error:
        lines.put_nowait(error)
    except MmdError as error:
        lines.put_nowait(ApiError(500, str(error), code="failed"))
    except Exception:
        lines.put_nowait(ApiError(500, "internal error; see journalctl -u mmd-gateway", code="internal_error"))
        raise
    finally:
        lines.put_nowait(None)


async def _options(request: web.Request, operation: str) -> dict[str, object]:
    """The JSON body of an operation; ApiError 400 for anything that it does not take."""
    text = await request.text()
    try:
        options = json.loads(text) if text else {}
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(options, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    unknown = set(options) - _OPTIONS.get(operation, set())
    if unknown:
        raise ApiError(400, f"{operation} does not take {', '.join(sorted(unknown))}", code="unknown_option")
    if "level" in options and (isinstance(options["level"], bool) or options["level"] not in (1, 2)):
        raise ApiError(400, f"level: {options['level']!r} is neither 1 nor 2", code="bad_option", param="level")
    if not isinstance(options.get("force", False), bool):
        raise ApiError(400, f"force: {options['force']!r} is neither true nor false", code="bad_option", param="force")
    return options
