"""Browsers' pages of other origins (fetch.spec.whatwg.org, CORS protocol): which may call, and what their answers say of that.

A browser names the origin of the page that it acts for. Before a request that a form could not send it asks whether it may (a
preflight, without credentials), and lets the page see an answer only if that names its origin. What engines say of it is
dropped: they cannot know who may call. There are no cookies here, so credentials are not allowed; a page sends its key itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.exchange import Exchange, date_line
from mmd.gateway.relay.head import RequestHead
from mmd.origins import ANY_ORIGIN, is_open_to

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["CorsExchange", "cors_lines"]

_ADMIN: Final = b"/api/"
_READING: Final = frozenset((b"GET", b"HEAD"))

# A browser need not ask again for this long. Chrome's limit is two hours; a changed configuration is to be noticed earlier.
_MAX_AGE_S: Final = 600


def cors_lines(origins: Sequence[str], origin: bytes) -> bytes:
    """What the head of an answer to a page of `origin` says of that; `origins`: gateway.cors_origins."""
    if not origins:
        return b""
    if ANY_ORIGIN in origins:
        return b"Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: *\r\n"
    if not is_open_to(origins, origin.decode("ascii", "replace")):
        return b"Vary: Origin\r\n"
    return b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: *\r\nVary: Origin\r\n" % origin


class CorsExchange(Exchange):
    """An answer to a browser rather than to its page. Whether there is a path, and its method, the page's request finds out."""

    def __init__(
        self,
        client: "ClientConnection",
        request: RequestHead,
        length: int | None,
        origins: Sequence[str],
        *,
        administers: bool,
    ) -> None:
        """`administers`: /api may be the admin API's."""
        super().__init__(client, request, length)
        self._origins = origins
        self._administers = administers

    @staticmethod
    def of(
        client: "ClientConnection",
        request: RequestHead,
        length: int | None,
        origins: Sequence[str],
        *,
        administers: bool,
    ) -> "CorsExchange | None":
        """The answer to a request that needs leave; None: it is a WebSocket of a page that may have it."""
        exchange = CorsExchange(client, request, length, origins, administers=administers)
        return None if request.websocket and exchange._may(b"GET") else exchange

    def _may(self, method: bytes) -> bool:
        """Whether the page may send the request. WebSockets are read and written, and pages of ours may have them."""
        request = self.request
        origin = request.origin.decode("ascii", "replace")
        if request.websocket and request.host is not None and request.origin.partition(b"://")[2] == request.host:
            return True
        changes = self._administers and request.path.startswith(_ADMIN) and method not in _READING
        return is_open_to(self._origins, origin, by_name=changes)

    def begin(self) -> None:
        request = self.request
        method = request.field(b"access-control-request-method") or request.method
        if not self._may(method):
            words = b"pages of %b may not send %b %b" % (request.origin, method, request.path)
            message = f"{words.decode('ascii', 'replace')}: gateway.cors_origins does not name that origin"
            self.fail(ApiError(403, message, code="origin_not_allowed"))
            return
        lines = b"HTTP/1.1 204 No Content\r\n%bAccess-Control-Allow-Methods: %b\r\n" % (date_line(), method)
        fields = request.field(b"access-control-request-headers")
        if fields:
            lines += b"Access-Control-Allow-Headers: %b\r\n" % fields
        if request.field(b"access-control-request-private-network") == b"true":
            lines += b"Access-Control-Allow-Private-Network: true\r\n"
        lines += b"Access-Control-Max-Age: %d\r\n" % _MAX_AGE_S
        self.status, self.started = 204, True
        self.client.write(self.client.head(lines, b""))
        self._finish(aborted=False)
