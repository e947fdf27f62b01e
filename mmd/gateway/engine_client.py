"""HTTP to the engines: one pool of connections per instance, over its Unix socket or its loopback port."""

import asyncio
import json
from collections.abc import Mapping

import aiohttp

from mmd.engines.base import HttpCall
from mmd.errors import MmdError

__all__ = ["EngineClient", "EngineError", "EnginePool"]

# uvicorn closes an idle connection after 5 s (engines.md); ours must be the first to let go, or a request meets a dead one.
_KEEPALIVE_S = 4.0
_CONNECT_TIMEOUT_S = 5.0


class EngineError(MmdError):
    """An engine's control API failed or did not answer in time."""


class EngineClient:
    """Connections to one endpoint: `unix:/path` or `http://host:port`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        connector: aiohttp.BaseConnector
        if endpoint.startswith("unix:"):
            connector = aiohttp.UnixConnector(endpoint.removeprefix("unix:"), limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._base = "http://localhost"
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._base = endpoint.rstrip("/")
        # No limit on the whole: an answer takes as long as it takes; its client and the engine's watchdog end it.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)

    def request(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes) -> "_Answer":
        """An engine's answer as a context manager; its body is streamed."""
        skip = ("User-Agent", "Accept-Encoding", "Accept")
        return self._session.request(
            method, self._base + path, headers=headers, data=body, skip_auto_headers=skip, allow_redirects=False
        )

    async def call(self, call: HttpCall) -> Mapping[str, object]:
        """Carry out a control call; EngineError for anything but a 200 in time."""
        data = None if call.body is None else json.dumps(call.body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(call.timeout_s):
                async with self._session.request(call.method, self._base + call.path, data=data, headers=headers) as answer:
                    text = await answer.text()
        except TimeoutError as error:
            raise EngineError(f"{call.method} {call.path} took longer than {call.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineError(f"{call.method} {call.path} failed: {error}") from error
        if answer.status != 200:
            raise EngineError(f"{call.method} {call.path} answered {answer.status}: {text[:200]}")
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    async def close(self) -> None:
        await self._session.close()


_Answer = aiohttp.client._RequestContextManager


class EnginePool:
    """The clients of all endpoints in use."""

    def __init__(self) -> None:
        self._clients: dict[str, EngineClient] = {}

    def client(self, endpoint: str) -> EngineClient:
        client = self._clients.get(endpoint)
        if client is None:
            client = self._clients[endpoint] = EngineClient(endpoint)
        return client

    async def forget(self, endpoint: str) -> None:
        """Close the idle connections to an endpoint whose engine is gone."""
        client = self._clients.pop(endpoint, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        for endpoint in list(self._clients):
            await self.forget(endpoint)
