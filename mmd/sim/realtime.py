"""OpenAI's realtime API over a WebSocket, text only: what the client says comes back as the answer's text."""

import asyncio
import contextlib
import json
import uuid
import weakref
from collections.abc import Mapping
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from mmd.sim.call import ENGINE, State, model_of, occupied, state_of
from mmd.sim.engine import Engine
from mmd.sim.errors import ApiError, BadRequestError
from mmd.sim.fields import content_text
from mmd.sim.generate import generate
from mmd.sim.jobs import Job
from mmd.sim.text import count_tokens

__all__ = ["realtime"]


class Sockets(State):
    """The open connections."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()

    def add(self, socket: web.WebSocketResponse) -> None:
        self._open.add(socket)

    async def close(self) -> None:
        """Close them: an engine does not end while clients hold idle connections."""
        for socket in list(self._open):
            await socket.close(code=WSCloseCode.SERVICE_RESTART)


class Session:
    """One connection. It takes a place in the engine only while it answers, so an idle one does not keep a model awake."""

    def __init__(self, engine: Engine, model: str, socket: web.WebSocketResponse) -> None:
        self._engine = engine
        self._socket = socket
        self._session: dict[str, Any] = {"type": "realtime", "model": model, "output_modalities": ["text"]}
        self._session |= {"id": _name("sess"), "object": "realtime.session", "instructions": ""}
        self._said: list[str] = []
        self._answering: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Until the client leaves; what is being answered then is stopped."""
        await self._send("session.created", session=self._session)
        try:
            async for message in self._socket:
                try:
                    if message.type is not WSMsgType.TEXT:
                        raise BadRequestError("events are JSON objects, in text messages")
                    await self._take(_event(message.data))
                except ApiError as error:
                    await self._send("error", error={"type": "invalid_request_error", "code": None, "message": str(error)})
        finally:
            await self._stop()

    async def _take(self, event: Mapping[str, Any]) -> None:
        match event.get("type"):
            case "session.update":
                given = event.get("session")
                if not isinstance(given, dict):
                    raise BadRequestError("session: an object is required")
                self._session |= {"instructions": str(given.get("instructions", self._session["instructions"]))}
                await self._send("session.updated", session=self._session)
            case "conversation.item.create":
                item = event.get("item")
                if not isinstance(item, dict):
                    raise BadRequestError("item: an object is required")
                self._said.append(content_text(item.get("content")))
                await self._send("conversation.item.created", item={"id": _name("item"), "object": "realtime.item"} | item)
            case "response.create":
                if self._answering is not None and not self._answering.done():
                    raise BadRequestError("there is a response in progress already")
                self._answering = asyncio.create_task(self._answer())
                await asyncio.sleep(0)  # it begins before a response.cancel that is here already, and so tells of its end
            case "response.cancel":
                if self._answering is None or self._answering.done():
                    raise BadRequestError("there is no response in progress")
                await self._stop()
            case other:
                raise BadRequestError(f"type: {other!r} is not simulated")

    async def _answer(self) -> None:
        prompt = self._said[-1] if self._said else ""
        said = [text for text in (str(self._session["instructions"]), *self._said) if text]
        job = Job(model=str(self._session["model"]), prompt=prompt, prompt_tokens=sum(map(count_tokens, said)))
        response = {"id": _name("resp"), "object": "realtime.response", "status": "in_progress", "output": []}
        item: dict[str, Any] = {"id": _name("item"), "type": "message", "role": "assistant"}
        where = {"response_id": response["id"], "item_id": item["id"], "output_index": 0, "content_index": 0}
        text, tokens, status = "", 0, "cancelled"
        try:
            async with occupied(self._engine):
                await self._send("response.created", response=response)
                async for _, one in generate(self._engine, [job]):
                    text, tokens = text + one.text, tokens + one.tokens
                    if one.text:
                        await self._send("response.text.delta", **where, delta=one.text)
                    status = {"stop": "completed", "abort": "failed"}.get(one.finish_reason or "", status)
                await self._send("response.text.done", **where, text=text)
        except ApiError:
            status = "failed"
        finally:
            if not self._socket.closed:
                item |= {"status": "completed" if status == "completed" else "incomplete"}
                item |= {"content": [{"type": "text", "text": text}]}
                usage = {"input_tokens": job.prompt_tokens, "output_tokens": tokens, "total_tokens": job.prompt_tokens + tokens}
                await self._send("response.done", response=response | {"status": status, "output": [item], "usage": usage})

    async def _stop(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait([self._answering])

    async def _send(self, kind: str, **fields: object) -> None:
        with contextlib.suppress(ConnectionError):  # the client has left: whoever reads from it ends this
            await self._socket.send_json({"type": kind, "event_id": _name("event"), **fields})


async def realtime(request: web.Request) -> web.StreamResponse:
    """GET /v1/realtime, a WebSocket."""
    engine = request.app[ENGINE]
    model = model_of(engine, request.query.get("model"))
    socket = web.WebSocketResponse(protocols=("realtime",))
    await socket.prepare(request)
    state_of(request, Sockets).add(socket)
    await Session(engine, model, socket).serve()
    return socket


def _event(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"JSON decode error: {error}") from None
    if not isinstance(event, dict):
        raise BadRequestError("an event is a JSON object")
    return event


def _name(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
