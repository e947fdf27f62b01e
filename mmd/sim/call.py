"""One inference request: its body, the model that it names, and its time in the engine."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from aiohttp import web

from mmd.sim.engine import Engine
from mmd.sim.errors import BadRequestError, NotFoundError, RefusedError

__all__ = ["ENGINE", "MAX_BODY_BYTES", "STATES", "Call", "State", "inference", "json_body", "model_of", "occupied", "state_of"]

_State = TypeVar("_State", bound="State")


class State:
    """What the handlers of some routes keep between requests; made when the first of them asks for it."""

    async def close(self) -> None:
        """The engine ends."""


ENGINE = web.AppKey("engine", Engine)
STATES = web.AppKey("states", dict[type[State], State])

MAX_BODY_BYTES = 64 << 20


class Call(NamedTuple):
    """What a handler works with once its request is running."""

    engine: Engine
    body: Mapping[str, Any]
    model: str
    """The engine's own name or an adapter's."""


async def json_body(request: web.Request) -> dict[str, Any]:
    """The body, which must be a JSON object; BadRequestError."""
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"JSON decode error: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    return body


def model_of(engine: Engine, name: object) -> str:
    """The model that a client names; without one, the engine's own. NotFoundError, in vLLM's words."""
    if not name:
        return engine.options.model
    if not isinstance(name, str):
        raise BadRequestError(f"model: expected a string, got {json.dumps(name)}", param="model")
    if name != engine.options.model and name not in engine.options.lora:
        raise NotFoundError(f"The model `{name}` does not exist.", param="model")
    return name


def state_of(request: web.Request, kind: type[_State]) -> _State:
    """The one of this kind that this engine has."""
    states = request.app[STATES]
    if kind not in states:
        states[kind] = kind()
    found = states[kind]
    assert isinstance(found, kind)
    return found


@asynccontextmanager
async def occupied(engine: Engine) -> AsyncIterator[None]:
    """A place in the engine, as `Engine.request` has it; RefusedError where the first one is to be refused."""
    async with engine.request():
        if engine.options.faults.refuse_warm_up and engine.served == 0:
            raise RefusedError("told to refuse the warm-up")
        yield


@asynccontextmanager
async def inference(request: web.Request, body: Mapping[str, Any] | None = None) -> AsyncIterator[Call]:
    """A request in flight: `body` or else the JSON that it brings, its model checked before it takes a place."""
    engine = request.app[ENGINE]
    given = await json_body(request) if body is None else body
    model = model_of(engine, given.get("model"))
    async with occupied(engine):
        yield Call(engine, given, model)
