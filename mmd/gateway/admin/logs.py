"""Lines of the journal: of one model, or of all of mmd."""

import re
from asyncio import Event as Closing
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Final

from aiohttp import web

from mmd.answers import LogLine
from mmd.errors import MmdError
from mmd.gateway.admin.events import FOLLOW, lines
from mmd.gateway.admin.route import EVENT_STREAM, LAST_EVENT_ID, ApiResponse, Parameter, Route, flag, number
from mmd.gateway.admin.stream import EventStream, until
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.scope import Scope
from mmd.systemd.journal import CURSOR_PATTERN, LINES_MAX, JournalEntry, JournalQuery, entries
from mmd.systemd.journal_service import served_entries

__all__ = ["LogRoutes"]

_LINES: Final = 100

# Each is a process that reads, and its journalctl (MaxConnections= of mmd-journal.socket).
_STREAMS_MAX: Final = 16

_CURSOR: Final = re.compile(CURSOR_PATTERN)


class LogRoutes:
    def __init__(self, dispatcher: Dispatcher, scope: Scope, closing: Closing) -> None:
        """`closing`: set when streams have to end."""
        self._dispatcher = dispatcher
        self._socket = scope.journal_socket
        self._closing = closing
        self._open = 0

    def routes(self) -> list[Route]:
        model = Parameter("model", "Of this model, by name, alias or unit id; without it, of all of mmd.", {"type": "string"})
        cursor = replace(LAST_EVENT_ID, schema={"type": "string", "pattern": f"^({_CURSOR.pattern})?$"})
        return [
            Route(
                "GET",
                "/api/v1/logs",
                self.logs,
                "The log",
                ApiResponse("Server-sent events: `data` is a LogLine, `id` its cursor in the journal.", LogLine, EVENT_STREAM),
                description="What systemd says of a model's units is among it. An event `error` says that no more can be read.",
                parameters=(model, FOLLOW, lines("The last so many.", LINES_MAX, _LINES), cursor),
                errors=(404, 429, 503),
                private=True,  # engines may log what they are asked
            )
        ]

    async def logs(self, request: web.Request) -> web.StreamResponse:
        follow, most = flag(request, "follow"), number(request, "lines", _LINES, LINES_MAX)
        name, cursor = request.query.get("model"), request.headers.get("Last-Event-ID") or None
        if cursor and not _CURSOR.fullmatch(cursor):
            raise ApiError(400, "Last-Event-ID is no cursor of the journal", code="bad_parameter", param="Last-Event-ID")
        model_id = None if name is None else self._id(name)
        if self._open >= _STREAMS_MAX:
            message = f"{_STREAMS_MAX} logs are being read already"
            raise ApiError(429, message, code="too_many_logs", retry_after_s=5)
        self._open += 1
        try:
            query = JournalQuery(model_id, most, follow, cursor or "")
            found = entries(query, user=True) if self._socket is None else await served_entries(self._socket, query)
            return await self._stream(request, found)
        except MmdError as error:
            raise ApiError(503, str(error), code="journal_unreadable") from error
        finally:
            self._open -= 1

    def _id(self, name: str) -> str:
        config = self._dispatcher.config
        model = config.resolve(name)
        if model is not None:
            return model.id
        if all(model.id != name for model in config.models.values()):
            raise no_such_model(name, config)
        return name

    async def _stream(self, request: web.Request, found: AsyncGenerator[JournalEntry, None]) -> web.StreamResponse:
        stream = EventStream(request)
        await stream.open()
        try:
            async with aclosing(until(self._closing, found)) as coming:
                async for entry in coming:
                    if entry is None:
                        await stream.keep_alive()
                    else:
                        await stream.send(asdict(_line(entry)), id_=entry.cursor)
        except MmdError as error:
            await stream.send({"message": str(error)}, event="error")
        return await stream.close()


def _line(entry: JournalEntry) -> LogLine:
    return LogLine(entry.time, entry.message, entry.priority, entry.model, entry.unit, entry.identifier, entry.pid)
