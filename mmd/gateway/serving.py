"""What the gateway asks of all that serves clients on some listening sockets: HTTP servers, and those of raw TCP ports."""

import socket
from collections.abc import Callable, Collection
from typing import Protocol

__all__ = ["Giver", "Heir", "Serving"]

Heir = Callable[[int, bytes, bool | None, bool], None]
"""Takes a connection: its descriptor, what was read of it, whether the event stream that has begun on it is chunked, and
whether its request was let in already."""

Giver = Callable[[int, bytes, bool | None], None]
"""The same between processes of one gateway, where no request was let in yet."""


class Serving(Protocol):
    name: str
    leaving: bool
    heir: Heir | None

    @property
    def connections(self) -> Collection[object]:
        """Those of clients that are served here."""

    async def start(self) -> None:
        """Accept."""

    async def adopt(self, connection: socket.socket, read: bytes, chunked: bool | None, *, let_in: bool = False) -> None:
        """Go on with a connection that another process has accepted, see Heir."""

    def hand_over(self, heir: Heir) -> None:
        """Accept nothing more, and send every connection to `heir` as soon as it waits for nothing here."""

    async def stop_accepting(self) -> None:
        """From now on new connections wait for the next gateway."""

    async def drain(self, timeout_s: float) -> None:
        """Finish what was accepted, for `timeout_s` at most, then close every connection."""
