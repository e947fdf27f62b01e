"""How slow a client may be: with what it is to read, and with the body that it sends. Looked at once a second."""

import asyncio

from mmd.config import Timeouts
from mmd.gateway.relay.framing import Body

__all__ = ["Unread", "Upload"]


class Unread:
    """What was written to a connection and waits in its write buffer, below the mark at which writing stops as well."""

    __slots__ = ("_since", "_size")

    def __init__(self) -> None:
        self._size = 0
        self._since = 0.0

    def stuck_s(self, transport: asyncio.Transport | None, now: float) -> float:
        """For how long nothing was read of it, as far as its size tells at each look: it grows with each event of a stream, and
        becomes less only when the client reads."""
        size = 0 if transport is None else transport.get_write_buffer_size()
        if not size or size < self._size or not self._size:
            self._since = now
        self._size = size
        return now - self._since if size else 0.0


class Upload:
    """A request's body that comes in pieces: a `Body`, and how it comes."""

    __slots__ = ("_begun", "_body", "_held_since", "_received")

    def __init__(self, body: Body, now: float) -> None:
        self._body = body
        self._begun = now
        self._held_since = 0.0
        self._received = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """See Body.feed."""
        self._received += len(data)
        return self._body.feed(data)

    def hold(self, now: float, *, full: bool) -> None:
        """Whether it is not read, since whom it is for does not keep up. That is no fault of the client's."""
        if full and not self._held_since:
            self._held_since = now
        elif not full and self._held_since:
            self._begun += now - self._held_since
            self._held_since = 0.0

    def late(self, now: float, allowed: Timeouts) -> bool:
        """Whether less has come than should have, which tells the same of a body whose length is not known. The last byte of
        one that keeps to the rate comes at the latest after `request_s` and a second for each `body_rate_bytes`."""
        if self._held_since:
            return False
        return (now - self._begun - allowed.request_s) * allowed.body_rate_bytes > self._received
