"""One request and its answer: the answer's framing followed, its head written anew, its content passed on as it comes.

Who answers is an `Upstream`: a connection to an engine (relay.engine) or the gateway's own application
(relay.application). What they send is read by the code below, whichever it is.
"""

from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from mmd.gateway.api_error import ApiError, error_content
from mmd.gateway.relay.framing import Body, Chunked, Empty, Length, ToTheEnd, chunk, last_chunk
from mmd.gateway.relay.head import MalformedError, RequestHead, ResponseHead, ResponseParser, head_lines
from mmd.gateway.relay.known import KnownHeads

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["Exchange", "Upstream", "date_line", "error_lines"]

_known: Final[KnownHeads[ResponseHead]] = KnownHeads()

# Before an answer. A server may send any number (RFC 9110, 15.2); nobody has seen more than two.
_INTERIM_MAX: Final = 16


class Upstream(Protocol):
    """Who answers an exchange. It calls `Exchange.received` with every piece, and `Exchange.ended` when there comes no more."""

    def hold(self) -> None:
        """The client does not keep up: read no further."""

    def go_on(self) -> None: ...

    def release(self, *, in_step: bool) -> None:
        """The answer is complete. `in_step`: and nothing followed it, so that another request may."""

    def abort(self) -> None: ...


def date_line() -> bytes:
    return b"Date: %b\r\n" % formatdate(usegmt=True).encode()


def error_lines(error: ApiError, path: bytes = b"") -> tuple[bytes, bytes, bytes]:
    """An error as the lines of its head, the one that frames it, and its content, for a client that asked for `path`."""
    fields, content = error_content(error, path)
    lines = head_lines(error.status, HTTPStatus(error.status).phrase.encode(), fields) + date_line()
    return lines, b"Content-Length: %d\r\n" % len(content), content


class Exchange:
    """Begun by its client connection with a request's head; over when it has called `ClientConnection.answered`."""

    def __init__(self, client: "ClientConnection", request: RequestHead, length: int | None) -> None:
        """`length`: the request's Content-Length."""
        self.client = client
        self.request = request
        self.length = length
        self.id_line = request.id_line
        """What the head of the answer says of the request's id."""
        self.upstream: Upstream | None = None
        self.status = 0
        self.started = False
        """Whether the head of an answer has gone to the client."""
        self.over = False
        self.sandboxed = False
        """The answer is an engine's, in an origin that is not its own."""
        self._parser: ResponseParser | None = None
        self._interim = 0
        """How many interim answers (1xx) have come."""
        self._body: Body | None = None
        self._chunked = False
        self._reusable = False
        self._withheld = False
        """Not all of the content goes to the client."""
        self._passing: Chunked | None = None
        """The answer's body, where both sides chunk it alike."""

    # What the client connection calls.

    def begin(self) -> None:
        """There is more to come than the head."""

    def feed(self, piece: bytes) -> None:
        """A piece of the request's body."""
        raise NotImplementedError

    def end(self) -> None:
        """The request is complete."""
        raise NotImplementedError

    def whole(self, body: bytes) -> None:
        """The request came in one piece."""
        self.begin()
        if not self.over:
            self.feed(body)
        if not self.over:
            self.end()

    def tunnel(self, data: bytes) -> None:
        """The client speaks after a 101."""
        raise NotImplementedError

    def resume(self, *, chunked: bool) -> None:
        """The client has the head of an event stream already, from another process."""
        raise NotImplementedError

    def unsent(self) -> bytes | None:
        """The whole request, if nobody has been asked to answer it yet, so that another process may; else None."""
        return None

    @property
    def begun(self) -> bool | None:
        """Whether the answer that the client has the head of is chunked; None when there is none."""
        return self._chunked if self.started else None

    def judge_again(self, *, required: bool) -> None:
        """Other API keys are in force: end what they do not permit. `required`: clients need one."""

    def withdraw(self) -> None:
        """Another process answers it."""
        self.over = True
        self.closed()

    def lost(self) -> None:
        """The client has gone: so does the work for it, at once."""
        if not self.over:
            self.status = 499  # what nginx calls a client that has left
            self._finish(aborted=True)

    def hold(self) -> None:
        if self.upstream is not None:
            self.upstream.hold()

    def go_on(self) -> None:
        if self.upstream is not None:
            self.upstream.go_on()

    # What the upstream calls.

    def received(self, data: bytes) -> None:
        """Bytes of the answer."""
        passing, body = self._passing, self._body
        if passing is not None:
            if passing.is_one(data):  # of a stream's bytes nearly all go this way
                self._note(data)
                self.client.write(data)
                return
        elif body is None and self._parser is None and not self.started:
            known = _known.find(data)
            if known is not None and self._whole(data, *known):
                return
        out = b""
        try:
            if body is None:
                found = self._read_head(data)
                if found is None:
                    return
                out, data = found
                body = self._body
                assert body is not None
            piece, rest = body.feed(data)
        except MalformedError as error:
            if out:
                self.client.write(out)
            self.broken(f"what it sent is not HTTP: {error}")
            return
        if piece:
            piece = self.content(piece)
            if self._chunked and piece:
                piece = chunk(piece)
            out = out + piece if out else piece
        if rest is not None:
            self._complete(out, in_step=not rest)
        elif out:
            self.client.write(out)

    def _whole(self, data: bytes, head: ResponseHead, length: int | None, end: int) -> bool:
        """An answer in one piece, with a head that was seen before: most small ones are. False: not so, nothing was done."""
        client = self.client
        if length is None or len(data) - end != length or head.bodiless or self.request.method == b"HEAD" or not head.dated:
            return False
        self.status, self.started, self._reusable = head.status, True, head.keep_alive
        content = data[end:]
        self._note(content)
        lines = head.sandboxed_lines() if self.sandboxed else head.lines
        client.write(client.head(lines, b"Content-Length: %d\r\n" % length) + content)
        self._finish(aborted=False, in_step=True)
        return True

    def ended(self, error: Exception | None) -> None:
        """The upstream's connection is gone."""
        if self.over:
            return
        if self._body is None:
            self.unanswered(error)
        elif error is None and self._body.ends_at_eof():
            self._complete(b"", in_step=False)
        else:
            self.broken(str(error or "closed before the answer was complete"))

    # What kinds of exchange do in their own way.

    def _note(self, piece: bytes) -> None:
        """Look at a piece of the answer."""

    def content(self, piece: bytes) -> bytes:
        """Look at a piece of the answer's content; what of it the client gets."""
        self._note(piece)
        return piece

    def head_for(self, head: ResponseHead, length: int | None) -> bytes:
        """The head that the client gets for the upstream's."""
        self.started = True
        lines = head.sandboxed_lines() if self.sandboxed else head.lines
        lines = lines if head.dated else lines + date_line()
        return self.client.head(lines, self._framing(length if head.status != 204 else None))

    def unanswered(self, error: Exception | None) -> None:
        """The upstream has gone without an answer."""
        self.broken(str(error or "closed without an answer"))

    def broken(self, reason: str) -> None:
        """The answer ends in the middle, or makes no sense."""
        self.fail(ApiError(502, f"the engine broke the connection: {reason}", code="engine_failed", retry_after_s=1))

    def closed(self) -> None:
        """The exchange is over: give back what it holds."""

    # The rest.

    def fail(self, error: ApiError) -> None:
        """Answer with an error; where an answer has begun, cut it so that it does not look complete."""
        self.status = error.status
        if self.started:
            self.client.abort()
        else:
            self.started = True
            lines, framing, content = error_lines(error, self.request.path)
            head = self.client.head(lines, framing)
            self.client.write(head if self.request.method == b"HEAD" else head + content)
        self._finish(aborted=True)

    def _framing(self, length: int | None) -> bytes:
        """How the content is framed for the client, as a line of its head."""
        if length is not None:
            return b"Content-Length: %d\r\n" % length
        if isinstance(self._body, Empty):
            return b""
        if self.request.version == "1.1":
            self._chunked = True
            return b"Transfer-Encoding: chunked\r\n"
        self.client.close_after = True
        return b""

    def _read_head(self, data: bytes) -> tuple[bytes, bytes] | None:
        """The client's head and what follows the upstream's; None when there is nothing to go on with yet."""
        found = _known.find(data) if self._parser is None else None
        while found is None or found[0].status < 200:
            if found is None:
                found = self._parse_head(data)
            if found is None:
                return None
            head, _, end = found
            if head.status == 101:
                self._switch(head, data[end:])
                return None
            if head.status < 200:  # an interim answer, which nobody asked for: we do not send Expect
                self._interim += 1
                if self._interim > _INTERIM_MAX:  # one after the other would keep the client waiting for ever, and us busy
                    raise MalformedError(f"more than {_INTERIM_MAX} interim answers")
                found, data = None, data[end:]
                if not data:
                    return None
        head, length, end = found
        self.status, self._reusable = head.status, head.keep_alive
        if self.request.method == b"HEAD" or head.bodiless:
            self._body = Empty()
        elif length is not None:
            self._body = Length(length)
        else:
            self._body = Chunked() if head.chunked else ToTheEnd()
        lines = self.head_for(head, length)
        if self._chunked and not self._withheld and isinstance(self._body, Chunked):
            self._passing = self._body
        return lines, data[end:]

    def _parse_head(self, data: bytes) -> tuple[ResponseHead, int | None, int] | None:
        first = self._parser is None
        parser = self._parser or ResponseParser()
        end = parser.parse(data)
        if end is None:
            self._parser = parser
            return None
        self._parser = None
        head = parser.head
        # A location may have to be written anew, see Route.lines; a cookie is a secret of one client's.
        if first and not head.field(b"location") and not head.field(b"set-cookie"):
            _known.learn(parser.head, data[:end])
        return parser.head, parser.head.length, end

    def _switch(self, head: ResponseHead, data: bytes) -> None:
        """101: from now on bytes go through as they are, both ways."""
        if not self.request.websocket or self.started:
            raise MalformedError("101 without having been asked")
        self.status, self.started, self._body = 101, True, ToTheEnd()
        self.client.close_after = True
        lines = head.sandboxed_lines() if self.sandboxed else head.lines  # it may set cookies as any answer may
        self.client.write(lines + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + data)
        self.client.switched()

    def _complete(self, out: bytes, *, in_step: bool) -> None:
        if self._chunked:
            out += last_chunk
        if out:
            self.client.write(out)
        if not in_step and not isinstance(self._body, ToTheEnd):
            self.client.close_after = True  # it sent more than it announced: nothing after this can be trusted
        self._finish(aborted=False, in_step=in_step)

    def _finish(self, *, aborted: bool, in_step: bool = False) -> None:
        self.over = True
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            if aborted:
                upstream.abort()
            else:
                upstream.release(in_step=in_step and self._reusable)
        self.closed()
        self.client.answered(self)
