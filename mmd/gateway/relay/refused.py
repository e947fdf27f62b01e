"""A request that is refused by its head, whatever else there is of it."""

from typing import TYPE_CHECKING

from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.framing import chunk, last_chunk
from mmd.gateway.relay.head import RequestHead

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["RefusedExchange"]


class RefusedExchange(Exchange):
    def __init__(self, client: "ClientConnection", request: RequestHead, length: int | None, error: ApiError) -> None:
        super().__init__(client, request, length)
        self._error = error

    def begin(self) -> None:
        """Before the body is read: a client that nobody knows costs no memory."""
        if not self.started:
            self.fail(self._error)
            return
        self.status = self._error.status
        event = self._error.event()
        self.client.write(chunk(event) + last_chunk if self._chunked else event)
        self._finish(aborted=True)

    def resume(self, *, chunked: bool) -> None:
        """An event stream, which another process has begun before its key was revoked: an event says so and ends it."""
        self.started, self._chunked = True, chunked
