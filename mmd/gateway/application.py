"""The gateway's own routes, those of aiohttp, on connections of a `mmd.gateway.server`."""

import logging
import socket
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from mmd.errors import MmdError
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.application import VISITOR, ApplicationExchange
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.inference import Inference
from mmd.gateway.relay.visitor import Visitor
from mmd.gateway.server import GRACE_S, Door, Server
from mmd.gateway.serving import Giver
from mmd.printable import quoted

__all__ = ["ApplicationServer", "visitor_of"]

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


class ApplicationServer(Server):
    """Inference by the relay, everything else by an application."""

    def __init__(
        self,
        name: str,
        inference: Inference,
        routes: Iterable[web.AbstractRouteDef],
        sockets: Iterable[socket.socket],
        *,
        elsewhere: Giver | None = None,
        door: Door = Door.API,
    ) -> None:
        super().__init__(name, inference, sockets, elsewhere=elsewhere, door=door)
        app = web.Application(middlewares=[_answer_errors])
        app.add_routes(routes)
        # handler_cancellation: a client that goes away cancels its handler. shutdown_timeout: `drain` has waited already.
        self._runner = web.AppRunner(
            app, handle_signals=False, handler_cancellation=True, access_log=None, shutdown_timeout=GRACE_S
        )
        self.application: web.Server | None = None

    async def start(self) -> None:
        await self._runner.setup()
        self.application = self._runner.server
        await super().start()

    def other(self, client: ClientConnection, request: RequestHead, length: int | None, visitor: Visitor | None) -> Exchange:
        assert self.application is not None
        return ApplicationExchange(client, request, length, self.application, visitor)

    async def drain(self, timeout_s: float) -> None:
        await super().drain(timeout_s)
        await self._runner.cleanup()


def visitor_of(request: web.Request) -> Visitor | None:
    """Whose key came with a request; None where none is asked for. ConnectionResetError: whoever asked has gone."""
    if request.transport is None:
        raise ConnectionResetError("the client has gone")
    visitor: Visitor | None = request.transport.get_extra_info(VISITOR)
    return visitor


@web.middleware
async def _answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turn every failure of a handler into OpenAI's shape; an unexpected one is logged and says no more than that."""
    try:
        return await handler(request)
    except ApiError as error:
        return _response(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _response(request, _plain(request, error))
    except MmdError as error:
        return _response(request, ApiError(500, str(error), code="failed"))
    except (ConnectionError, TimeoutError):
        raise
    except Exception:
        _log.exception("%s %s failed", quoted(request.method), quoted(request.path))
        return _response(request, ApiError(500, "internal error; see journalctl -u mmd-gateway", code="internal_error"))


def _response(request: web.Request, error: ApiError) -> web.Response:
    content = error.content(request.rel_url.raw_path.encode())
    return web.Response(
        body=content, status=error.status, headers=error.headers(), content_type="application/json", charset="utf-8"
    )


def _plain(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        return ApiError(404, f"there is no {request.method} {request.path}", code="not_found")
    if error.status == 405:
        allowed = error.headers.get("Allow", "")
        message = f"{request.path} does not take {request.method}; it takes {allowed}"
        return ApiError(405, message, code="method_not_allowed", fields={"Allow": allowed} if allowed else {})
    return ApiError(error.status, error.text or error.reason, code="bad_request")
