"""Places for connections: as many as there are descriptors for.

A connection takes a descriptor, and its request another one at an engine. If there were more connections than that, accepting
would fail (and the event loop ask for it again and again), and so would everything else that opens a file: connecting to an
engine above all, which must never look like an engine that is gone. So at a ceiling nothing is accepted: clients wait in the
kernel's queue. Those who have most connections lose some that are idle, and accepting goes on.

There is one `Places` in each process, which all its servers share.
"""

import asyncio
import heapq
import logging
import resource
from collections.abc import Collection, Iterator
from typing import Any, Final, Protocol

from mmd.gateway.relay.clients import Whose

__all__ = ["Holder", "Places", "Tenancy", "places"]

_log = logging.getLogger(__name__)

# For listening sockets, logs, databases, D-Bus, channels and whatever libraries open: an eighth of all, between these.
_RESERVE: Final = (48, 1024)
_RESERVE_PART: Final = 8

# A client's connection and the engine's, or both ends of a tunnel.
_DESCRIPTORS: Final = 2

# How many of all connections are given up at a time, how often at most, and from when on accepting goes on.
_BATCH_PART: Final = 16
_BATCH_LEAST: Final = 64
_PAUSE_S: Final = 0.25

# That the ceiling was reached is logged, but not each time.
_LOG_S: Final = 60.0


class Tenancy(Protocol):
    """A connection."""

    @property
    def idle_since(self) -> float | None:
        """Of the loop's clock; None: it is in use."""

    @property
    def whose(self) -> Whose: ...

    def abort(self) -> None: ...


class Holder(Protocol):
    """A server, whose connections these are."""

    @property
    def connections(self) -> Collection[Any]: ...

    def pause_accepting(self) -> None: ...

    def resume_accepting(self) -> None: ...


class Places:
    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        """`limit`: descriptors that this process may have."""
        reserve = min(max(limit // _RESERVE_PART, _RESERVE[0]), _RESERVE[1])
        self.ceiling = max(1, (limit - reserve) // _DESCRIPTORS)
        """As many connections may be accepted."""
        self.taken = 0
        self._loop = loop
        self._batch = max(1, self.ceiling // _BATCH_PART, min(_BATCH_LEAST, self.ceiling // 4))
        self._holders: list[Holder] = []
        self._paused = False
        self._logged = -_LOG_S

    def join(self, holder: Holder) -> None:
        """A server begins to accept."""
        self._holders.append(holder)
        if self._paused:
            holder.pause_accepting()

    def part(self, holder: Holder) -> None:
        """It accepts no more."""
        if holder in self._holders:
            self._holders.remove(holder)

    def retry(self, holder: Holder) -> None:
        """It could not accept when it was to."""
        if holder in self._holders and not self._paused:
            holder.resume_accepting()

    @property
    def full(self) -> bool:
        return self.taken >= self.ceiling

    def come(self) -> None:
        self.taken += 1
        if self.taken >= self.ceiling and not self._paused:
            self._pause()

    def go(self) -> None:
        self.taken -= 1
        if self._paused and self.taken <= self.ceiling - self._batch:
            self._paused = False
            for holder in tuple(self._holders):
                holder.resume_accepting()

    def _pause(self) -> None:
        self._paused = True
        now = self._loop.time()
        if now - self._logged >= _LOG_S:
            self._logged = now
            _log.warning("%d connections, as many as LimitNOFILE= has descriptors for: idle ones are closed", self.taken)
        for holder in tuple(self._holders):
            holder.pause_accepting()
        self._loop.call_later(_PAUSE_S, self._make_room)

    def _make_room(self) -> None:
        if not self._paused:
            return
        excess = self.taken - (self.ceiling - self._batch)
        for connection in _least_missed(self._holders, excess):
            connection.abort()
        self._loop.call_later(_PAUSE_S, self._make_room)


def _least_missed(holders: list[Holder], count: int) -> Iterator[Tenancy]:
    """Up to `count` idle connections: each time the one that was idle longest, of the client that has most."""
    owned: dict[str, int] = {}
    idle: dict[str, list[tuple[float, int, Tenancy]]] = {}
    for holder in holders:
        for number, connection in enumerate(holder.connections):
            client, since = connection.whose.client, connection.idle_since
            owned[client] = owned.get(client, 0) + 1
            if since is not None:
                idle.setdefault(client, []).append((since, number, connection))
    for each in idle.values():
        each.sort(key=lambda found: found[:2], reverse=True)
    most = [(-owned[client], client) for client in idle]
    heapq.heapify(most)
    while count > 0 and most:
        size, client = heapq.heappop(most)
        yield idle[client].pop()[2]
        count -= 1
        if idle[client]:
            heapq.heappush(most, (size + 1, client))


_places: dict[asyncio.AbstractEventLoop, Places] = {}


def places() -> Places:
    """This process's; its loop is the running one."""
    loop = asyncio.get_running_loop()
    found = _places.get(loop)
    if found is None:
        _places.clear()  # those of loops that are over, in tests
        found = _places[loop] = Places(loop, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return found
