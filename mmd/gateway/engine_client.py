"""HTTP to the engines: for each endpoint a client of its control API, and the relay's connections."""

import asyncio
import json
from collections.abc import Mapping

import aiohttp

from mmd.engines.base import HttpCall
from mmd.errors import MmdError
from mmd.gateway.relay.engine import EngineConnections

__all__ = ["EngineClient", "EngineError", "EnginePool"]

# As the relay's connections (mmd.gateway.relay.engine).
_KEEPALIVE_S = 4.0
_CONNECT_TIMEOUT_S = 5.0


class EngineError(MmdError):
    """An engine's control API failed or did not answer in time."""


class EngineClient:
    """The control API at one endpoint: `unix:/path` or `http://host:port`."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        connector: aiohttp.BaseConnector
        if endpoint.startswith("unix:"):
            connector = aiohttp.UnixConnector(endpoint.removeprefix("unix:"), limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._base = "http://localhost"
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._base = endpoint.rstrip("/")
        # No limit on the whole: each call has its own.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)

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


class EnginePool:
    """Everything that is open to the endpoints in use."""

    def __init__(self) -> None:
        self._clients: dict[str, EngineClient] = {}
        self._connections: dict[str, EngineConnections] = {}

    def client(self, endpoint: str) -> EngineClient:
        client = self._clients.get(endpoint)
        if client is None:
            client = self._clients[endpoint] = EngineClient(endpoint)
        return client

    def connections(self, endpoint: str) -> EngineConnections:
        """The relay's."""
        connections = self._connections.get(endpoint)
        if connections is None:
            connections = self._connections[endpoint] = EngineConnections(endpoint)
        return connections

    async def forget(self, endpoint: str) -> None:
        """Close the idle connections to an endpoint whose engine is gone."""
        connections = self._connections.pop(endpoint, None)
        if connections is not None:
            connections.close()
        client = self._clients.pop(endpoint, None)
        if client is not None:
            await client.close()

    async def close(self) -> None:
        for endpoint in {*self._clients, *self._connections}:
            await self.forget(endpoint)
