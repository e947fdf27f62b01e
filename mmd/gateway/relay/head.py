"""Heads of HTTP/1 messages: parsed by llhttp without any of its leniencies, and once more than that picky about framing.

llhttp (httptools) refuses by itself: duplicate, signed, empty or overflowing Content-Length, Content-Length together with
Transfer-Encoding, folded lines, bare CR or LF, white space before a colon, control characters and NUL. It lets through, and
this module refuses: any Transfer-Encoding but exactly `chunked`, one in HTTP/1.0, versions other than 1.0 and 1.1, several
spaces where one belongs in a request line, a request without its one Host, CONNECT, fragments in the target, absurd lengths.
tests/unit/test_relay_head.py holds each of them.

The parser sees heads only. Where a head ends is found twice, by us (CR LF CR LF) and by llhttp, and both must agree.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import httptools

from mmd.errors import MmdError
from mmd.gateway.relay.host_names import is_address
from mmd.gateway.relay.request_id import FIELD, id_line, without
from mmd.gateway.relay.sandbox import sandboxed

if TYPE_CHECKING:
    from mmd.gateway.api_error import ApiError
    from mmd.gateway.relay.visitor import Visitor

__all__ = [
    "HEAD_MAX_BYTES",
    "KEY_PROTOCOL",
    "MalformedError",
    "RequestHead",
    "RequestParser",
    "ResponseHead",
    "ResponseParser",
    "head_lines",
]

# Of answers, and of requests unless gateway.max_head says something else.
HEAD_MAX_BYTES: Final = 32 << 10
_LENGTH_MAX: Final = 1 << 50
"""A petabyte: nobody means more than that."""

_END: Final = b"\r\n\r\n"
_LINE_REST_BYTES: Final = len("  HTTP/1.1")
_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))

# Hop-by-hop (RFC 9110, 7.6.1), and what whoever writes the head sets anew.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    )
)
_OWN = _HOP_BY_HOP | {b"host", b"expect"}


class MalformedError(MmdError):
    """A message that has no one meaning; `status` is what a client is told."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Head:
    """What requests and responses have in common. `fields`: lower-case name, name, value; hop-by-hop and framing left out."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes, bytes]] = []
        self.length: int | None = None
        self.chunked = False
        self.keep_alive = True
        self.version = ""
        self.tokens: tuple[bytes, ...] = ()
        """Of Connection, in lower case."""
        self.upgrade = b""

    def field(self, name: bytes) -> bytes:
        """The first value of a field by its lower-case name; b"" without one."""
        return next((value for lower, _, value in self.fields if lower == name), b"")

    def _framing(self, lower: bytes, value: bytes) -> None:
        """Take in a field that says where the message ends or what the connection is for."""
        if lower == b"content-length":
            self.length = int(value)  # llhttp has seen digits only
            if self.length > _LENGTH_MAX:
                raise MalformedError("Content-Length is absurd")
        elif lower == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise MalformedError("the only transfer coding understood is chunked", status=501)
            self.chunked = True
        elif lower == b"connection":
            self.tokens += tuple(token.strip().lower() for token in value.split(b","))
        elif lower == b"upgrade":
            self.upgrade = value.strip().lower()

    def _settle(self, version: str) -> None:
        if version not in ("1.1", "1.0"):
            raise MalformedError(f"HTTP/{version} is not spoken here", status=505)
        self.version = version
        if version == "1.0":
            self.keep_alive = b"keep-alive" in self.tokens
            if self.chunked:
                raise MalformedError("HTTP/1.0 knows no Transfer-Encoding")
        if self.tokens:
            self.keep_alive = self.keep_alive and b"close" not in self.tokens
            # Connection may name more fields that are for us only (RFC 9110, 7.6.1).
            self.fields = [field for field in self.fields if field[0] not in self.tokens]


_WAIT = b"x-mmd-wait"
_OWN_SITE = frozenset((b"", b"none", b"same-origin"))

# Credentials for us are none of the engine's business, nor is what else is meant for us; what it compresses we could not count.
# The id is written anew.
_NOT_TO_ENGINE = frozenset((b"authorization", b"x-api-key", b"cookie", b"accept-encoding", _WAIT, FIELD))

# What a proxy says of its client. Engines believe who connects to them, so anybody's word for it would be as good as a proxy's.
_FORWARDED = (b"forwarded", b"x-forwarded-", b"x-real-ip", b"x-client-ip")

KEY_PROTOCOL: Final = b"openai-insecure-api-key."
"""Begins the subprotocol by which browsers send a WebSocket's key (platform.openai.com/docs/guides/realtime-websocket)."""


class RequestHead(_Head):
    def __init__(self) -> None:
        super().__init__()
        self.method = b""
        self.target = b""
        self.path = b""
        """The target without its query."""
        self.host: bytes | None = None
        self.continues = False
        """The client waits for `100 Continue` before it sends the body."""
        self.id_line = b""
        """Its X-Request-Id, if it has one that is sane; it is not among the other lines."""
        self.engine_lines = b""
        """The fields that an engine gets."""
        self.forwarded_lines = b""
        """Those that it gets besides from a trusted proxy (gateway.trusted_proxies)."""
        self.origin = b""
        """Of the page that a browser acts for."""
        self.needs_leave = False
        """The browser asks whether the page may send a request, or opens a WebSocket for it, which it lets read everything."""
        self.wait = b""
        """X-MMD-Wait: how long the client wants to wait for its model."""
        self.plain = False
        """It names neither a page nor a host that could be a page's: an address or a name of loopback, and no Origin."""
        self.page_edition: object = None
        """The settings by which `page_refusal` was found out."""
        self.page_refusal: ApiError | None = None
        self.visitor: Visitor | None = None
        """Whose key came with it, as `Access` found out when it had the keys of that `edition`."""
        self.edition: object = None
        self.key_index = -1
        """Which of `fields` lacks its value: the credential, where the head is remembered (mmd.gateway.relay.known)."""
        self.known: RequestHead | None = None
        """That head, of one that was found again, with another credential."""
        self.key_digest = b""
        """Of the credential that `visitor` came with."""

    def is_from(self, visitor: "Visitor", edition: object) -> None:
        """Remember whose key came with it, also where the same credential comes again with the same head."""
        self.visitor, self.edition = visitor, edition
        if self.known is not None:
            self.known.visitor, self.known.edition, self.known.key_digest = visitor, edition, self.key_digest

    def written(self, length: int, wait: bytes, id_line: bytes = b"") -> bytes:
        """The head of the same request with a body of `length` bytes, for another reader. `wait`: what is left of its wait;
        `id_line`: the id it was given."""
        connection = b"keep-alive" if self.keep_alive else b"close"
        return b"%b %b HTTP/%b\r\nHost: %b\r\n%b%bConnection: %b\r\nContent-Length: %d\r\n\r\n" % (
            self.method,
            self.target,
            self.version.encode(),
            self.host or b"",
            id_line or self.id_line,
            _lines((lower, name, wait if lower == _WAIT else value) for lower, name, value in without(self.fields)),
            connection,
            length,
        )

    @property
    def websocket(self) -> bool:
        """Whether it asks to become a WebSocket. Any other Upgrade is ignored, which RFC 9110, 7.8 allows."""
        return (
            self.upgrade == b"websocket"
            and b"upgrade" in self.tokens
            and self.method == b"GET"
            and self.version == "1.1"
            and self.length is None
            and not self.chunked
        )

    def take(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower not in _OWN:
            self.fields.append((lower, name, value))
        elif lower == b"host":
            if self.host is not None:
                raise MalformedError("more than one Host")
            self.host = value
        elif lower == b"expect":
            if value.lower() != b"100-continue":
                raise MalformedError("the only expectation understood is 100-continue", status=417)
            self.continues = True
        else:
            self._framing(lower, value)

    def settle(self, method: bytes, version: str) -> None:
        """Judge the whole."""
        self._settle(version)
        if method not in _METHODS:
            raise MalformedError("the method is not served here", status=501)
        self.method = method
        if self.host is None:
            if version == "1.1":
                raise MalformedError("no Host")
            self.host = b"localhost"
        if self.target[:1] != b"/":
            self._origin_form()
        if b"#" in self.target:
            raise MalformedError("a target has no fragment")
        self.path = self.target.partition(b"?")[0]
        self.continues = self.continues and version == "1.1"
        self.wait, self.origin = self.field(_WAIT), self.field(b"origin")
        site = self.field(b"sec-fetch-site")
        self.plain = self.origin == b"" and site in _OWN_SITE and is_address(self.host)
        asks = method == b"OPTIONS" and self.field(b"access-control-request-method") != b""
        self.needs_leave = self.origin != b"" and (asks or self.websocket)
        self.id_line = id_line(self.field(FIELD))
        self.engine_lines = _lines(_for_engine(self.fields))
        self.forwarded_lines = _lines(field for field in self.fields if field[0].startswith(_FORWARDED))

    def _origin_form(self) -> None:
        """Absolute targets are legal (RFC 9112, 3.2.2), and name the host as well."""
        scheme, found, rest = self.target.partition(b"://")
        if found and scheme.lower() in (b"http", b"https"):
            authority, _, path = rest.partition(b"/")
            self.host, self.target = authority, b"/" + path
        elif self.target != b"*" or self.method != b"OPTIONS":
            raise MalformedError("the target is no path")


_NOT_TO_CLIENT = frozenset((b"server", FIELD))


def _for_engine(fields: Iterable[tuple[bytes, bytes, bytes]]) -> Iterator[tuple[bytes, bytes, bytes]]:
    for lower, name, value in fields:
        if lower in _NOT_TO_ENGINE or lower.startswith(_FORWARDED):
            continue
        if lower == b"sec-websocket-protocol" and KEY_PROTOCOL in value:
            offered = [each.strip() for each in value.split(b",")]
            value = b", ".join([each for each in offered if each[: len(KEY_PROTOCOL)] != KEY_PROTOCOL])
            if not value:
                continue
        yield lower, name, value


class ResponseHead(_Head):
    def __init__(self) -> None:
        super().__init__()
        self.status = 0
        self.reason = b""
        self.bodiless = False
        self.dated = False
        self.lines = b""
        """What a client gets of it, but for framing and Connection."""
        self._sandboxed_lines = b""

    def take(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower in _HOP_BY_HOP:
            self._framing(lower, value)
        else:
            self.fields.append((lower, name, value))

    def settle(self, status: int, version: str) -> None:
        self._settle(version)
        self.status = status
        if not self.reason.isascii() or not self.reason.decode().isprintable():
            self.reason = b""
        self.bodiless = status < 200 or status in (204, 304)
        self.dated = any(lower == b"date" for lower, _, _ in self.fields)
        self.lines = head_lines(status, self.reason, self.fields)

    def sandboxed_lines(self) -> bytes:
        """As `lines`, where the engine is not alone in the origin."""
        if not self._sandboxed_lines:
            self._sandboxed_lines = sandboxed(self.lines)
        return self._sandboxed_lines


def head_lines(status: int, reason: bytes, fields: Iterable[tuple[bytes, bytes, bytes]]) -> bytes:
    """The start of an answer's head. Which server is behind us is nobody's business; the id, and which pages may call, are
    ours to tell."""
    passed = (field for field in fields if field[0] not in _NOT_TO_CLIENT and not field[0].startswith(b"access-control-"))
    return b"HTTP/1.1 %d %b\r\n%b" % (status, reason, _lines(passed))


def _lines(fields: Iterable[tuple[bytes, bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % (name, value) for _, name, value in fields])


class _Parser:
    """Feeds one head to llhttp, piece by piece, and nothing that follows it."""

    __slots__ = ("_done", "_last", "_limit", "_size")

    def __init__(self, limit: int) -> None:
        self._done = False
        self._limit = limit
        self._last = b""
        self._size = 0

    def feed(self, parser: "httptools.HttpRequestParser | httptools.HttpResponseParser", data: bytes) -> int | None:
        """How many bytes of `data` belong to the head, None while there must come more; MalformedError."""
        last = self._last
        if not last:
            found = data.find(_END)
            end = found + 4 if found >= 0 else -1
        else:
            found = (last + data[:3]).find(_END)
            if found >= 0:
                end = found + 4 - len(last)
            else:
                found = data.find(_END)
                end = found + 4 if found >= 0 else -1
        self._size += len(data) if end < 0 else end
        if self._size > self._limit:
            raise MalformedError(f"the head is larger than {self._limit >> 10} KiB", status=431)
        try:
            parser.feed_data(data if end < 0 or end == len(data) else data[:end])
        except httptools.HttpParserUpgrade:
            pass  # what follows the head is not llhttp's to see anyway
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, MalformedError):
                raise error.__context__ from None
            raise
        except httptools.HttpParserError as error:
            raise MalformedError(str(error) or "not HTTP") from None
        if self._done is not (end >= 0):
            raise MalformedError("the head does not end where its lines do")
        if end < 0:
            self._last = (last + data)[-3:]
            return None
        return end

    def on_headers_complete(self) -> None:
        self._done = True


class RequestParser(_Parser):
    """One request's head, of `limit` bytes at most."""

    __slots__ = ("_line_bytes", "_line_over", "_parser", "head", "on_header")

    def __init__(self, limit: int = HEAD_MAX_BYTES) -> None:
        super().__init__(limit)
        self._line_bytes = 0
        """Of the request line, as far as it has come."""
        self._line_over = False
        self.head = RequestHead()
        self.on_header = self.head.take
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.head.target += url

    def parse(self, data: bytes) -> int | None:
        """As `feed`; once it returns a number, `head` is complete."""
        parser = self._parser
        assert parser is not None, "a head is parsed once"
        if not self._line_over:
            at = data.find(b"\r")
            self._line_over = at >= 0
            self._line_bytes += at if self._line_over else len(data)
        end = self.feed(parser, data)
        if end is not None:
            method = parser.get_method()
            # llhttp takes any number of spaces between the two.
            if self._line_bytes != len(method) + len(self.head.target) + _LINE_REST_BYTES:
                raise MalformedError("the request line has white space that does not belong there")
            self.head.settle(method, parser.get_http_version())
            self._parser = None  # it knows our methods: a cycle for the garbage collector
        return end


class ResponseParser(_Parser):
    """One response's head."""

    __slots__ = ("_parser", "head", "on_header")

    def __init__(self) -> None:
        super().__init__(HEAD_MAX_BYTES)
        self.head = ResponseHead()
        self.on_header = self.head.take
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def on_status(self, reason: bytes) -> None:
        self.head.reason += reason

    def parse(self, data: bytes) -> int | None:
        """As `feed`; once it returns a number, `head` is complete."""
        parser = self._parser
        assert parser is not None, "a head is parsed once"
        end = self.feed(parser, data)
        if end is not None:
            self.head.settle(parser.get_status_code(), parser.get_http_version())
            self._parser = None
        return end
