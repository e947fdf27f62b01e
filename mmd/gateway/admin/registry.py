"""Models added and removed over the admin API: POST /api/v1/models, DELETE /api/v1/models/NAME.

The gateway may not write the configuration. It asks who may (mmd.registration), and answers when what was written has come into
use: by mmd-reload.path, as every change of the files.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from mmd.answers import Leaving, Registered, Removed
from mmd.config import Model
from mmd.gateway.admin.route import ApiResponse, Body, Parameter, Route, as_json, flag
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.snapshot import Snapshot
from mmd.policy.events import Release
from mmd.policy.instance import Instance
from mmd.registration import REQUEST_BYTES, Registration, carry_out, read_reply
from mmd.registry import Fault, RegistryError, revision
from mmd.scope import Scope, ScopeKind

__all__ = ["RegistryRoutes"]

_log = logging.getLogger(__name__)

# A configuration of hundreds of models is checked in a second, on a busy machine in some.
_REGISTRAR_LIMIT_S = 30.0

# daemon-reload runs every generator of the machine, and waits for its turn.
_IN_USE_WITHIN_S = 60.0
_GLANCE_S = 0.5

_STATUS: Mapping[Fault, int] = {
    Fault.INVALID: 400,
    Fault.EXISTS: 409,
    Fault.UNKNOWN: 404,
    Fault.SHARED: 409,
    Fault.UNSOUND: 409,
    Fault.UNWRITABLE: 503,
}


_EXAMPLE = {"name": "Qwen/Qwen3-0.6B", "engine": "vllm", "venv": "/opt/vllm", "gpus": 0, "ram": "4GiB"}


class NewModel(msgspec.Struct, frozen=True):
    """Beside its name the settings that mmd.yaml(5) has for models."""

    name: str


class NewModels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings by name."""

    models: dict[str, dict[str, Any]]


class RegistryRoutes:
    def __init__(self, dispatcher: Dispatcher, snapshot: Snapshot, scope: Scope) -> None:
        self._dispatcher = dispatcher
        self._snapshot = snapshot
        self._scope = scope
        self._turn = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route(
                "POST",
                "/api/v1/models",
                self.add,
                "Add models, and wait until they are in use",
                ApiResponse("What they are now.", Registered, status=201),
                description="All or none. Each becomes a file in models.d. `verify` or `start` is the next call.",
                parameters=(Parameter("replace", "Also those that there are already.", {"type": "boolean", "default": False}),),
                body=Body("One model, or several.", NewModel | NewModels, required=True, example=_EXAMPLE),
                errors=(409, 413, 503, 504),
            ),
            Route(
                "DELETE",
                "/api/v1/models/{name}",
                self.remove,
                "Remove a model, and wait until it is out of use",
                ApiResponse("What it was, and what of it still runs.", Removed),
                description="What it still answers is finished; its units are stopped after that.",
                parameters=(Parameter("force", "Stop its units at once.", {"type": "boolean", "default": False}),),
                errors=(404, 409, 503, 504),
            ),
        ]

    async def add(self, request: web.Request) -> web.Response:
        """Register models; 201 with what they are when they are in use (`?replace=true`: even if there are such already)."""
        models = await _models(request)
        asked = {"add": models, "replace": flag(request, "replace")}
        # Shielded: a client that goes away does not leave the file half way between us and the registrar.
        done = await asyncio.shield(asyncio.ensure_future(self._register(asked)))
        await self._in_use(lambda: all(self._has(name, wanted) for name, wanted in done.models.items()), done)
        configured = self._dispatcher.config.models
        found = tuple(self._snapshot.model(configured[name]) for name in done.models if name in configured)
        return as_json(Registered(found, tuple(map(str, done.files))), status=201)

    async def remove(self, request: web.Request) -> web.Response:
        """Take a model out of the configuration; 200 when it is out of use. What it still answers is finished, its units are
        stopped after that; with `?force=true` at once."""
        name, force = request.match_info["name"], flag(request, "force")
        model = self._model(name)
        files: tuple[str, ...] = ()
        if model is not None and name in model.lora:
            message = f"{name} is an adapter of {model.name}: remove that, or take it out of its lora"
            raise ApiError(409, message, code=f"model_{Fault.SHARED}")
        if model is not None:
            done = await asyncio.shield(asyncio.ensure_future(self._register({"remove": model.name})))
            files = tuple(map(str, done.files))
            await self._in_use(lambda: model.name not in self._dispatcher.config.models, done)
        leaving = [i for i in self._orphans() if i.unit.id == (model.id if model else name) or _was(i, name)]
        if model is None and not leaving:
            raise no_such_model(name, self._dispatcher.config)
        for instance in leaving if force else ():
            self._dispatcher.post(Release(instance.unit, force=True))
        told = tuple(Leaving(str(i.unit), i.load) for i in leaving)
        return as_json(Removed(model.name if model else name, files, told))

    def _model(self, name: str) -> Model | None:
        config = self._dispatcher.config
        return config.resolve(name) or next((m for m in config.models.values() if m.id == name), None)

    def _has(self, name: str, wanted: str) -> bool:
        model = self._dispatcher.config.models.get(name)
        return model is not None and revision(model) == wanted

    def _orphans(self) -> list[Instance]:
        """Instances that run although their model is in the configuration no more."""
        state = self._dispatcher.scheduler.state
        return [instance for unit, instance in sorted(state.instances.items()) if state.model_of(unit) is None]

    async def _register(self, asked: Mapping[str, object]) -> Registration:
        line = json.dumps(asked).encode() + b"\n"
        if len(line) > REQUEST_BYTES:
            raise ApiError(413, f"more than {REQUEST_BYTES >> 10} KiB in all", code="too_large")
        async with self._turn:
            try:
                if self._scope.kind is ScopeKind.USER:  # the files are the gateway's own user's
                    reply = await asyncio.to_thread(carry_out, self._scope, line)
                else:
                    reply = await self._ask_registrar(line)
                done = read_reply(reply)
            except RegistryError as error:
                hint = f" ({error.hint})" if error.hint else ""
                param = error.key or None
                raise ApiError(
                    _STATUS[error.fault], f"{error.message}{hint}", code=f"model_{error.fault}", param=param
                ) from error
        _log.info("%s: %s", next(iter(asked)), ", ".join(map(str, done.files)))
        return done

    async def _ask_registrar(self, line: bytes) -> bytes:
        """The registrar's answer; empty when it broke off."""
        path = self._scope.registrar_socket
        try:
            async with asyncio.timeout(_REGISTRAR_LIMIT_S):
                reader, writer = await asyncio.open_unix_connection(str(path), limit=REQUEST_BYTES)
                try:
                    writer.write(line)
                    await writer.drain()
                    return await reader.readline()
                finally:
                    writer.close()
        except (BrokenPipeError, ConnectionResetError):
            return b""
        except TimeoutError as error:
            raise ApiError(503, f"nobody answers at {path}; see journalctl -t mmd-registrar", code="no_registrar") from error
        except OSError as error:
            message = f"{path} cannot be reached: {error.strerror}; systemctl start mmd-registrar.socket, or use mmdctl as root"
            raise ApiError(503, message, code="no_registrar") from error

    async def _in_use(self, there: Callable[[], bool], done: Registration) -> None:
        """Wait until the configuration in use is the one on disk, as far as `there` tells."""
        deadline_s = asyncio.get_running_loop().time() + _IN_USE_WITHIN_S
        while not there():
            await self._dispatcher.next_change(_GLANCE_S)
            if self._dispatcher.retired:
                raise ApiError(
                    503, "the gateway has been replaced meanwhile; GET /api/v1/models tells", code="gateway_replaced"
                )
            if asyncio.get_running_loop().time() > deadline_s:
                files, problems = ", ".join(map(str, done.files)), "; ".join(self._snapshot.problems)
                why = problems or "is mmd-reload.path active? journalctl -u mmd-reload.service tells"
                raise ApiError(504, f"{files} is changed, but not in use yet: {why}", code="not_in_use")


def _was(instance: Instance, name: str) -> bool:
    return instance.model is not None and instance.model.name == name


async def _models(request: web.Request) -> dict[str, Any]:
    """What a body defines: `{"name": NAME, SETTING: VALUE, ...}`, or `{"models": {NAME: {SETTING: VALUE}}}` for several."""
    try:
        raw = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    match raw:
        case {"models": dict(models), **rest} if not rest:
            return models
        case {"name": str(name), **settings} if "models" not in settings:
            return {name: settings}
    message = 'the body must be an object with a "name" and settings, or {"models": {NAME: SETTINGS}}'
    raise ApiError(400, message, code="invalid_json")
