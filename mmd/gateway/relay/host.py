"""Whose connections clients' connections are: what they ask of the server that has accepted them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mmd.config import Gateway
from mmd.gateway.relay.exchange import Exchange
from mmd.gateway.relay.head import RequestHead

if TYPE_CHECKING:
    from mmd.gateway.relay.client import ClientConnection

__all__ = ["Host"]


class Host(Protocol):
    """Whose connection it is."""

    leaving: bool

    @property
    def gateway(self) -> Gateway:
        """The settings in force."""

    def came(self, client: "ClientConnection", fresh: bool) -> bool:
        """There is a connection. False: its client has as many as it may; a `fresh` one is to be refused then."""

    def went(self, client: "ClientConnection") -> None:
        """It is no more."""

    def answered(self, client: "ClientConnection") -> None:
        """A request is over that came through a trusted proxy."""

    @property
    def heir(self) -> Callable[[int, bytes, bool | None, bool], None] | None:
        """Where connections go that have nothing to wait for here: a descriptor, what was read of it, and of an event stream
        that has begun whether it is chunked; and whether a request moves on that has been let in. None: they stay."""

    def exchange(self, client: "ClientConnection", request: RequestHead, length: int | None) -> Exchange | None:
        """Who answers this request; None: another process, by `pass_on`."""

    def cors_lines(self, origin: bytes) -> bytes:
        """What an answer to a page of `origin` says of that."""

    def pass_on(self, connection: int, read: bytes, chunked: bool | None) -> None:
        """Take a connection, by its descriptor, whose next request is another process's; `read` begins with that request,
        on whose answer see `heir`."""
