"""A route of the admin API: who answers it, and all that its description says."""

from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from aiohttp import web

from mmd.gateway.api_error import ApiError

__all__ = [
    "EVENT_STREAM",
    "LAST_EVENT_ID",
    "ApiResponse",
    "Body",
    "Parameter",
    "Route",
    "as_json",
    "flag",
    "let_see_all",
    "number",
    "sees_all",
]

EVENT_STREAM: Final = "text/event-stream"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Parameter:
    """Of a query, or a header field; those of the path follow from the path."""

    name: str
    description: str
    schema: dict[str, Any]
    place: Literal["query", "header"] = "query"


@dataclass(frozen=True, slots=True)
class Body:
    """What a request may bring, or must."""

    description: str
    type: Any
    media: tuple[str, ...] = ("application/json",)
    required: bool = False
    example: Any = None


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """The answer when all is well."""

    description: str
    type: Any
    """A dataclass of the wire format, or what it is made of."""
    media: str = "application/json"
    status: int = 200


@dataclass(frozen=True, slots=True)
class Route:
    """`path` is a template: `{name}` stands for anything, slashes included."""

    method: str
    path: str
    handler: _Handler
    summary: str
    answer: ApiResponse
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    errors: tuple[int, ...] = field(default=())
    """Statuses of the errors that it answers besides those of the parameters."""
    private: bool = False
    """What it shows is for administrators only."""

    def definition(self, below: Iterable[str] = ()) -> web.RouteDef:
        """Its place in the application. `below`: what may follow its path in those of other routes, `/start`: there a slash is
        not the name's."""
        known = {parameter.name for parameter in self.parameters if parameter.place == "query"}

        async def answer(request: web.Request) -> web.StreamResponse:
            for name in request.query:
                if name not in known:
                    message = f"{self.path} takes no parameter {name!r}"
                    raise ApiError(400, message, code="unknown_parameter", param=name)
                if len(request.query.getall(name)) > 1:
                    raise ApiError(400, f"{name} is given twice", code="bad_parameter", param=name)
            return await self.handler(request)

        pattern = ".+" + "".join(f"(?<!{suffix})" for suffix in below)
        # An answer to HEAD is over with its head, and its handler would go on for ever.
        more = {"allow_head": False} if self.answer.media == EVENT_STREAM else {}
        return web.RouteDef(self.method, self.path.replace("}", f":{pattern}}}"), answer, more)


LAST_EVENT_ID: Final = Parameter(
    "Last-Event-ID", "The id of the last event that the client has: go on behind it.", {"type": "string"}, "header"
)
"""What a browser's EventSource sends when it comes back."""


# A handler runs in a task of its own request (mmd.gateway.relay.application). aiohttp 3.11 has no typed place in a request.
_SEES_ALL: Final[ContextVar[bool]] = ContextVar("sees_all", default=False)


def let_see_all(allowed: bool) -> None:
    """Whether who asks may see what is private: for the handler of the request that is being answered."""
    _SEES_ALL.set(allowed)


def sees_all() -> bool:
    """Whether who asks may see what is private, such as lines of engines' logs; not unless somebody has said so."""
    return _SEES_ALL.get()


def as_json(value: object, status: int = 200) -> web.Response:
    """The answer that a dataclass of the wire format makes."""
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json", charset="utf-8")


def flag(request: web.Request, name: str) -> bool:
    """A query parameter that is true or false; false without it."""
    text = request.query.get(name, "false")
    if text not in ("true", "false"):
        raise ApiError(400, f"{name}: {text!r} is neither true nor false", code="bad_parameter", param=name)
    return text == "true"


def number(request: web.Request, name: str, default: int, most: int) -> int:
    """A query parameter that is a number from 0 to `most`."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most):
        raise ApiError(400, f"{name}: {text!r} is no number from 0 to {most}", code="bad_parameter", param=name)
    return int(text)
