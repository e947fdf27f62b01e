"""The events of late, and as they come."""

import time
from asyncio import Event as Closing
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Final

from aiohttp import web

from mmd.events import Event, Missed, to_json, without_private
from mmd.gateway.admin.route import EVENT_STREAM, LAST_EVENT_ID, ApiResponse, Parameter, Route, flag, number, sees_all
from mmd.gateway.admin.stream import EventStream, until
from mmd.gateway.event_log import EventLog, Listener, Noted

__all__ = ["FOLLOW", "EventRoutes", "lines"]

FOLLOW: Final = Parameter("follow", "Whether the stream goes on with what comes.", {"type": "boolean", "default": False})

_MOST: Final = 1000


def lines(description: str, most: int, default: int) -> Parameter:
    return Parameter("lines", description, {"type": "integer", "minimum": 0, "maximum": most, "default": default})


class EventRoutes:
    def __init__(self, log: EventLog, closing: Closing) -> None:
        """`closing`: set when streams have to end."""
        self._log = log
        self._closing = closing

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                "/api/v1/events",
                self.events,
                "What happens",
                ApiResponse("Server-sent events: `data` is an Event, `event` its type.", Event, EVENT_STREAM),
                description="A client that does not keep up is told so by an event `missed`, and its stream ends.",
                parameters=(FOLLOW, lines("The last so many of those that are kept.", _MOST, _MOST), LAST_EVENT_ID),
            )
        ]

    async def events(self, request: web.Request) -> web.StreamResponse:
        follow, most = flag(request, "follow"), number(request, "lines", _MOST, _MOST)
        last = request.headers.get("Last-Event-ID") or None
        stream = EventStream(request)
        with self._log.listening() as listener:
            kept, complete = self._log.since(last)  # with nothing between: what comes later, the listener has
            kept = kept[max(0, len(kept) - most) :] if last is None else kept
            await stream.open()
            if not complete:
                await self._miss(stream, "there were events since that are not kept any more")
            private = sees_all()
            await self._send(stream, kept, private=private)
            if follow:
                async with aclosing(until(self._closing, _coming(listener))) as coming:
                    async for noted in coming:
                        if noted is None:
                            await stream.keep_alive()
                        else:
                            await self._send(stream, (noted,), private=private)
                if listener.behind:
                    await self._miss(stream, "this client does not keep up; come back with Last-Event-ID")
        return await stream.close()

    async def _send(self, stream: EventStream, noted: Iterable[Noted], *, private: bool) -> None:
        for each in noted:
            event = each.event if private else without_private(each.event)
            await stream.send(to_json(event), event=each.event.type, id_=self._log.id_of(each))

    async def _miss(self, stream: EventStream, message: str) -> None:
        missed = Missed(time.time(), message)
        await stream.send(to_json(missed), event=missed.type)


async def _coming(listener: Listener) -> AsyncGenerator[Noted, None]:
    while (noted := await listener.queue.get()) is not None:
        yield noted
