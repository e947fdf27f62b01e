"""The events of late, in memory, and whoever listens to those that come.

An event's id is `RUN-NUMBER`: of another run of the gateway nothing is known, so that a client which comes back with such an id
(Last-Event-ID) is told that it missed something, and gets all that there is.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from mmd.events import Event

__all__ = ["EventLog", "Listener", "Noted"]

# Half an hour of a busy gateway, in half a MiB.
_KEPT: Final = 1000

# How far a client may fall behind before it is sent away.
_BEHIND_MAX: Final = 256


class Noted(NamedTuple):
    """An event in the log."""

    number: int
    event: Event


class Listener:
    """A bounded queue of events for one client; None ends it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Noted | None] = asyncio.Queue(_BEHIND_MAX + 1)
        self.behind = False
        """It did not keep up, and gets no more."""

    def take(self, noted: Noted) -> None:
        if self.behind:
            return
        if self.queue.qsize() < _BEHIND_MAX:
            self.queue.put_nowait(noted)
        else:
            self.behind = True
            self.queue.put_nowait(None)


class EventLog:
    def __init__(self) -> None:
        self.run: Final = secrets.token_hex(4)
        self._noted: deque[Noted] = deque(maxlen=_KEPT)
        self._number = 0
        self._listeners: set[Listener] = set()

    def note(self, event: Event) -> None:
        self._number += 1
        noted = Noted(self._number, event)
        self._noted.append(noted)
        for listener in self._listeners:
            listener.take(noted)

    def id_of(self, noted: Noted) -> str:
        return f"{self.run}-{noted.number}"

    def since(self, last: str | None) -> tuple[list[Noted], bool]:
        """What came after the event with the id `last` (None: all that is kept), and whether all of that is here."""
        noted = list(self._noted)
        if last is None:
            return noted, True
        run, _, number = last.rpartition("-")
        if run != self.run or not number.isdecimal() or int(number) > self._number:
            return noted, False
        after = int(number)
        return [each for each in noted if each.number > after], not noted or noted[0].number <= after + 1

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """A listener to all that comes from now on."""
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
