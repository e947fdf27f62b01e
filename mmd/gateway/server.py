"""HTTP on sockets that systemd listens on: serve, and leave without losing a request.

The listening sockets belong to systemd. While no gateway accepts, connections wait in the kernel's queue, so a restart refuses
nobody. Leaving takes care of three kinds of connection: those with a request in hand finish it (the answer says `Connection:
close`); those that were accepted but have not spoken yet get `_GRACE_S` to do so; idle kept-alive ones are closed after it.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable

from aiohttp import web

from mmd.gateway.api_error import Handler, error_middleware

__all__ = ["BACKLOG", "Server"]

_log = logging.getLogger(__name__)

# asyncio calls listen() again on the inherited socket, with its own backlog: pass the unit's, or it shrinks (listen(2)).
BACKLOG = 1024
_GRACE_S = 0.5
_POLL_S = 0.02


class Server:
    """Some routes on some listening sockets."""

    def __init__(self, routes: Iterable[web.AbstractRouteDef], sockets: Iterable[socket.socket]) -> None:
        self._sockets = tuple(sockets)
        self._leaving = False
        self._requests = 0
        app = web.Application(middlewares=[self._count, error_middleware])
        app.add_routes(routes)
        app.on_response_prepare.append(self._say_goodbye)
        # handler_cancellation: a client that goes away cancels its handler, and with it the request to the engine.
        # shutdown_timeout: we have waited already, in `drain`.
        self._runner = web.AppRunner(
            app, handle_signals=False, handler_cancellation=True, access_log=None, shutdown_timeout=_GRACE_S
        )
        self._sites: list[web.SockSite] = []

    async def start(self) -> None:
        await self._runner.setup()
        for listening in self._sockets:
            site = web.SockSite(self._runner, listening, backlog=BACKLOG)
            await site.start()
            self._sites.append(site)

    async def stop_accepting(self) -> None:
        """From now on new connections wait for the next gateway."""
        self._leaving = True
        for site in self._sites:
            await site.stop()

    async def drain(self, timeout_s: float) -> None:
        """Finish what was accepted, for `timeout_s` at most, then close every connection."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while (waited := loop.time() - begun) < timeout_s:
            server = self._runner.server
            idle = server is None or not server.connections
            if not self._requests and (idle or waited >= _GRACE_S):
                break
            await asyncio.sleep(_POLL_S)
        if self._requests:
            _log.warning("%d requests are cut off after gateway.drain_timeout", self._requests)
        await self._runner.cleanup()

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._requests += 1
        try:
            return await handler(request)
        finally:
            self._requests -= 1

    async def _say_goodbye(self, _: web.Request, response: web.StreamResponse) -> None:
        if self._leaving:
            response.force_close()
