"""From a client to an engine and back: bytes through, status and headers kept, back-pressure kept.

When the client goes away its handler is cancelled, which closes the connection to the engine, which ends the generation there.
"""

from collections.abc import Mapping

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from mmd.gateway.api_error import ApiError
from mmd.gateway.engine_client import EngineClient

__all__ = ["EngineGoneError", "relay"]

# Hop-by-hop (RFC 9110, 7.6.1), and what belongs to one side only: credentials for us are none of the engine's business, and
# lengths are set anew by whoever writes.
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade")
)
_NOT_TO_ENGINE = _HOP_BY_HOP | {"host", "content-length", "authorization", "cookie", "expect", "accept-encoding"}
_NOT_TO_CLIENT = _HOP_BY_HOP | {"server", "date"}


class EngineGoneError(Exception):
    """Nobody listened at the engine's endpoint: nothing was sent, so the request may be tried elsewhere."""


async def relay(
    request: web.Request,
    engine: EngineClient,
    path: str,
    body: bytes,
    *,
    begun: web.StreamResponse | None = None,
) -> web.StreamResponse:
    """Forward a request and stream the answer back.

    `begun` is an event stream that has been opened already, to keep the client waiting: the engine's events follow on it, and
    an error of the engine becomes an event. EngineGoneError when no connection could be made.
    """
    headers = {key: value for key, value in request.headers.items() if key.lower() not in _NOT_TO_ENGINE}
    try:
        async with engine.request(request.method, path, headers=headers, body=body) as answer:
            if begun is None:
                return await _pass(request, answer)
            return await _continue(begun, answer)
    except aiohttp.ClientConnectorError as error:
        raise EngineGoneError(str(error)) from error
    except aiohttp.ClientError as error:
        # Before the head of the answer: afterwards _pass and _continue deal with it themselves.
        raise ApiError(502, f"the engine broke the connection: {error}", code="engine_failed", retry_after_s=1) from error


def _headers(raw: Mapping[str, str]) -> CIMultiDict[str]:
    return CIMultiDict((key, value) for key, value in raw.items() if key.lower() not in _NOT_TO_CLIENT)


async def _pass(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_headers(answer.headers))
    if "Content-Length" not in answer.headers and request.version >= aiohttp.HttpVersion11:
        response.enable_chunked_encoding()
    await response.prepare(request)
    while True:
        try:
            chunk = await answer.content.readany()
        except aiohttp.ClientError as error:  # the engine's; a client that goes away cancels us instead
            return await _cut(request, response, answer, error)
        if not chunk:
            break
        await response.write(chunk)
    await response.write_eof()
    return response


async def _cut(
    request: web.Request, response: web.StreamResponse, answer: aiohttp.ClientResponse, error: Exception
) -> web.StreamResponse:
    """The engine died in the middle: say so where the format allows it, and never let a cut answer look complete."""
    if answer.content_type == "text/event-stream":
        failure = ApiError(502, f"the engine broke the connection: {error}", code="engine_failed", retry_after_s=1)
        await response.write(failure.event())
        await response.write_eof()
        return response
    if request.transport is not None:
        request.transport.abort()
    return response


async def _continue(response: web.StreamResponse, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """After the comments of a waiting stream: the engine's events, its error as an event, or word that it has died."""
    if answer.status != 200:
        text = (await answer.content.read(65536)).decode("utf-8", "replace").strip()
        raise ApiError(answer.status, f"the engine answered {answer.status}: {text}", code="engine_error")
    while True:
        try:
            chunk = await answer.content.readany()
        except aiohttp.ClientError as error:
            chunk = b""
            failure = ApiError(502, f"the engine broke the connection: {error}", code="engine_failed", retry_after_s=1)
            await response.write(failure.event())
        if not chunk:
            break
        await response.write(chunk)
    await response.write_eof()
    return response
