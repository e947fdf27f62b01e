"""OpenAI's responses: answered at once or in the background, remembered, found again, cancelled and deleted by their id."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from mmd.sim.call import ENGINE, State, inference, json_body, model_of, occupied, state_of
from mmd.sim.engine import Engine
from mmd.sim.errors import ApiError, BadRequestError, NotFoundError
from mmd.sim.events import send_events
from mmd.sim.fields import whole
from mmd.sim.generate import generate
from mmd.sim.jobs import Job, responses_job

__all__ = ["Responses", "cancel", "create", "delete", "retrieve"]

_MOST_REMEMBERED = 1000
"""Then the oldest that are finished are forgotten, so that an engine that is left running does not grow."""

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
)
"""Settings of the request that the response repeats."""


class Response:
    """One response: its state, and its events from the first one on."""

    def __init__(self, job: Job, body: Mapping[str, Any]) -> None:
        self.job = job
        self.background = bool(body.get("background"))
        self.task: asyncio.Task[None] | None = None
        """Its work, when that is in the background."""
        self.state: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": job.model,
            "status": "queued" if self.background else "in_progress",
            "background": self.background,
            "store": body.get("store", True) is not False,
            "output": [],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
        } | {name: body[name] for name in _ECHOED if body.get(name) is not None}
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()

    @property
    def id(self) -> str:
        return str(self.state["id"])

    @property
    def finished(self) -> bool:
        return self.state["status"] not in {"queued", "in_progress"}

    async def work(self, engine: Engine) -> AsyncIterator[dict[str, Any]]:
        """Generate it: OpenAI's events in their order; `response.completed`, `.incomplete` or `.failed` is the last."""
        self.state["status"] = "in_progress"
        yield self._event("response.created", response=dict(self.state))
        yield self._event("response.in_progress", response=dict(self.state))
        item: dict[str, Any] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
        started = item | {"status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=started)
        where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **where, part=_part(""))
        text, tokens, reason = "", 0, None
        async for _, said in generate(engine, [self.job]):
            text, tokens, reason = text + said.text, tokens + said.tokens, said.finish_reason
            if said.text:
                yield self._event("response.output_text.delta", **where, delta=said.text, logprobs=[])
        yield self._event("response.output_text.done", **where, text=text, logprobs=[])
        yield self._event("response.content_part.done", **where, part=_part(text))
        item |= {"status": "completed" if reason == "stop" else "incomplete", "content": [_part(text)]}
        yield self._event("response.output_item.done", output_index=0, item=item)
        self.state |= _end(reason) | {"output": [item], "usage": _usage(self.job.prompt_tokens, tokens)}
        yield self._event(f"response.{self.state['status']}", response=dict(self.state))

    async def follow(self, after: int = -1) -> AsyncIterator[dict[str, Any]]:
        """The events with a number above `after`, those to come included, until it is finished."""
        place = max(0, after + 1)
        while True:
            news = self._news
            while place < len(self._events):
                yield self._events[place]
                place += 1
            if self.finished:
                return
            await news.wait()

    def end(self, status: str, error: str | None = None) -> None:
        """It is not going on: cancelled or failed. Those who follow it get no event of that, as from vLLM."""
        details = {"code": "server_error", "message": error} if error else None
        self.state |= {"status": status, "error": details}
        self._tell()

    def _event(self, kind: str, **fields: object) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": len(self._events), **fields}
        self._events.append(event)
        self._tell()
        return event

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Responses(State):
    """The responses that are remembered, by id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Response] = {}

    def add(self, response: Response) -> None:
        self._by_id[response.id] = response
        if len(self._by_id) > _MOST_REMEMBERED:
            oldest = next((name for name, one in self._by_id.items() if one.finished), None)
            if oldest is not None:
                del self._by_id[oldest]

    def find(self, name: str) -> Response:
        """NotFoundError, in vLLM's words."""
        try:
            return self._by_id[name]
        except KeyError:
            raise NotFoundError(f"Response with id '{name}' not found.", param="response_id") from None

    async def cancel(self, response: Response) -> None:
        """Stop its work in the background, if it still does any."""
        if response.task is not None and not response.finished:
            response.task.cancel()
            await asyncio.wait([response.task])
            if not response.finished:
                response.end("cancelled")

    async def remove(self, name: str) -> None:
        await self.cancel(self.find(name))
        del self._by_id[name]

    async def close(self) -> None:
        for response in list(self._by_id.values()):
            await self.cancel(response)


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    engine, remembered, body = request.app[ENGINE], state_of(request, Responses), await json_body(request)
    model = model_of(engine, body.get("model"))
    earlier = body.get("previous_response_id")
    usage = (remembered.find(str(earlier)).state["usage"] or {}) if earlier else {}
    response = Response(responses_job(body, model, earlier_tokens=usage.get("total_tokens", 0)), body)
    if response.background:
        if not response.state["store"]:
            raise BadRequestError(
                "background: only a response that is stored can be made in the background", param="background"
            )
        return await _start(request, response, stream=bool(body.get("stream")))
    async with occupied(engine):
        if body.get("stream"):
            answer = await send_events(request, response.work(engine))
        else:
            async for _ in response.work(engine):
                pass
            answer = web.json_response(response.state)
    if response.state["store"]:
        remembered.add(response)
    return answer


async def _start(request: web.Request, response: Response, *, stream: bool) -> web.StreamResponse:
    """Answer as soon as it has a place in the engine: a sleep that waits for what is in flight then waits for it."""
    engine, placed = request.app[ENGINE], asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            async with occupied(engine):
                if not placed.done():  # it is when the client has just left
                    placed.set_result(None)
                async for _ in response.work(engine):
                    pass
        except ApiError as error:
            response.end("failed", str(error))
            if not placed.done():
                placed.set_exception(error)

    first = dict(response.state)
    response.task = asyncio.create_task(work())
    try:
        await placed
    except asyncio.CancelledError:  # nobody has heard of it
        response.task.cancel()
        raise
    state_of(request, Responses).add(response)
    return await send_events(request, response.follow()) if stream else web.json_response(first)


async def retrieve(request: web.Request) -> web.StreamResponse:
    """GET /v1/responses/ID."""
    async with inference(request, request.query):
        response = state_of(request, Responses).find(request.match_info["id"])
        if request.query.get("stream") not in {"true", "True", "1"}:
            return web.json_response(response.state)
        after = whole(request.query, "starting_after", default=-1, lowest=0, highest=1 << 31)
        return await send_events(request, response.follow(after))


async def cancel(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses/ID/cancel."""
    async with inference(request, request.query):
        response = state_of(request, Responses).find(request.match_info["id"])
        if not response.background or (response.finished and response.state["status"] != "cancelled"):
            raise BadRequestError("Cannot cancel a synchronous response.", param="response_id")
        await state_of(request, Responses).cancel(response)
        return web.json_response(response.state)


async def delete(request: web.Request) -> web.StreamResponse:
    """DELETE /v1/responses/ID."""
    async with inference(request, request.query):
        name = request.match_info["id"]
        await state_of(request, Responses).remove(name)
        return web.json_response({"id": name, "object": "response", "deleted": True})


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _end(reason: str | None) -> dict[str, Any]:
    match reason:
        case "stop":
            return {"status": "completed"}
        case "length":
            return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        case _:
            return {"status": "failed", "error": {"code": "server_error", "message": "aborted: the engine was put to sleep"}}


def _usage(prompt: int, output: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }
