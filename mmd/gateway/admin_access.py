"""Who may do what in the admin API, and the log of it.

On the admin socket: whoever may open it, and the log says who that was. Over TCP, where there are keys, looking needs one for
it; what is private and changes need a key for administration, or `gateway.admin_auth: open`. Foreign web pages do not come as
far as this (mmd.gateway.relay.pages), but those of all origins if `gateway.cors_origins` is *: they may look and do no more.
"""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from mmd.config import AdminAuth, Gateway
from mmd.gateway.admin.route import let_see_all
from mmd.gateway.api_error import ApiError
from mmd.gateway.application import visitor_of
from mmd.gateway.peer import peer_of
from mmd.gateway.relay.pages import is_foreign
from mmd.gateway.relay.visitor import Visitor
from mmd.printable import quoted

__all__ = ["AdminAccess"]

_log = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_MAKE_KEY = "mmdctl keys add NAME --scope admin"
_MAKE_READ_KEY = "mmdctl keys add NAME --scope read"

# Of a path in the log. It has no blanks and nothing that breaks a line: it is as it came, percent-encoded.
_PATH_MAX = 200


class AdminAccess:
    """`settings`: the ones in force."""

    def __init__(self, settings: Callable[[], Gateway]) -> None:
        self._settings = settings

    def on_socket(self, route: web.RouteDef) -> web.RouteDef:
        """The route as it is on the admin socket."""

        async def logged(request: web.Request) -> web.StreamResponse:
            let_see_all(True)
            if not reads:
                peer = peer_of(request)
                _log.info("%s, asked by %s", _words(request), "somebody who has gone" if peer is None else await peer.words())
            return await handler(request)

        handler: _Handler = route.handler
        reads = _reads(route)
        return _with(route, logged)

    def over_tcp(self, route: web.RouteDef, *, private: bool) -> web.RouteDef:
        """The route as it is on the addresses of gateway.admin_listen; `private`: what it shows is not for everybody."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            who = self._judge(request, _words(request))
            let_see_all(True)
            if not reads:
                _log.info("%s, asked by %s at %s", _words(request), who, request.remote or "a Unix socket")
            return await handler(request)

        async def shown(request: web.Request) -> web.StreamResponse:
            visitor = visitor_of(request)
            self._judge_reader(visitor, _words(request))
            let_see_all(self._settings().admin_auth is AdminAuth.OPEN or (visitor is not None and visitor.admin))
            return await handler(request)

        handler: _Handler = route.handler
        reads = _reads(route)
        return _with(route, shown if reads and not private else guarded)

    def _judge_reader(self, visitor: Visitor | None, what: str) -> None:
        """ApiError 401 or 403 for somebody who may not look at what is not private. None: there are no keys."""
        if visitor is None or visitor.reader:
            return
        keyed = self._settings().admin_auth is AdminAuth.KEY
        if visitor.key is None and (visitor.tried or keyed):
            raise visitor.stranger()
        if visitor.key is not None and keyed:
            message = f"{what}: the API key {visitor.key.name} is for inference only; make one to look: {_MAKE_READ_KEY}"
            raise ApiError(403, message, code="read_key_needed")

    def _judge(self, request: web.Request, what: str) -> str:
        """Who asks, in words; ApiError 401 or 403 for somebody who may not."""
        visitor = visitor_of(request)
        if visitor is not None and visitor.key is not None and visitor.admin:
            return f"the API key {quoted(visitor.key.name)}"
        if visitor is not None and visitor.tried:
            raise visitor.stranger()
        if self._settings().admin_auth is AdminAuth.OPEN:
            self._refuse_foreign_pages(request)
            return "whoever it is"
        if visitor is not None and visitor.key is not None:
            message = (
                f"{what}: the API key {visitor.key.name} is not for administration; make one for administration: {_MAKE_KEY}"
            )
        else:
            message = f"{what}: over TCP this needs an API key for administration ({_MAKE_KEY}); or use mmdctl on this machine"
        raise ApiError(403, message, code="admin_key_needed")

    def _refuse_foreign_pages(self, request: web.Request) -> None:
        """A page of an origin that is open to all (*) may look at what everybody may, and do no more."""
        origin, site, host = (request.headers.get(name, "").encode() for name in ("Origin", "Sec-Fetch-Site", "Host"))
        if is_foreign(origin, site, host, self._settings().cors_origins, by_name=True):
            message = "a page of another site asks for this; an API key for administration permits it"
            raise ApiError(403, message, code="foreign_page")


def _with(route: web.RouteDef, handler: _Handler) -> web.RouteDef:
    return web.RouteDef(route.method, route.path, handler, route.kwargs)


def _reads(route: web.RouteDef) -> bool:
    return route.method in ("GET", "HEAD")


def _words(request: web.Request) -> str:
    """What is asked for, such as `stop demo/llama-8b`. Of the target's query nothing, and nothing that could break a line."""
    name, resource = request.match_info.get("name", ""), request.match_info.route.resource
    operation = "" if resource is None else resource.canonical.rpartition("/")[2]
    if name and operation.isalpha():
        return f"{operation} {quoted(name)}"
    return f"{request.method} {request.rel_url.raw_path[:_PATH_MAX]}"
