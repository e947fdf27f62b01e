"""One worker as the deciding process sees it."""

import asyncio
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from mmd.gateway.channel import Channel
from mmd.gateway.workers.messages import Connection, ToDecider, ToWorker
from mmd.gateway.workers.tally import Tally

__all__ = ["WorkerProcess"]

_COMMAND: Final = (sys.executable, "-I", "-m", "mmd.gateway.workers")


class WorkerProcess:
    """A process that runs, a channel to it, and the tally that it writes."""

    def __init__(
        self,
        process: Process,
        end: socket.socket,
        hear: "Callable[[WorkerProcess, ToDecider, list[int]], None]",
        lose: "Callable[[WorkerProcess], None]",
    ) -> None:
        self.process = process
        self.since = self.heard = asyncio.get_running_loop().time()
        self.tally_descriptor = Tally.make()
        self.tally = Tally(self.tally_descriptor)
        self._arrived: dict[int, int] = {}
        """By slot, what has been counted of its arrivals."""
        self.prepared = asyncio.Event()
        self.keys_asked = self.keys_known = 0
        """How often it was told of API keys, and how often it has answered."""
        self.connections: int | None = None
        """As it said last; None: unknown since it was told to leave."""
        self._channel = Channel(end, ToDecider, partial(hear, self), partial(lose, self))

    @classmethod
    async def start(
        cls,
        hear: "Callable[[WorkerProcess, ToDecider, list[int]], None]",
        lose: "Callable[[WorkerProcess], None]",
    ) -> "WorkerProcess":
        """`hear` gets what it says, with descriptors; `lose` is called once when it has gone. OSError: it cannot be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(*_COMMAND, stdin=theirs.fileno(), stdout=DEVNULL)
            except OSError:
                ours.close()
                raise
        return cls(process, ours, hear, lose)

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, message: ToWorker, *fds: int) -> None:
        self._channel.send(message, *fds)

    def give(self, connection: int, read: bytes, chunked: bool | None) -> None:
        """Let it serve a client's connection."""
        self.connections = (self.connections or 0) + 1
        self._channel.send_connection(Connection(chunked), connection, read)

    def arrivals(self, slot: int) -> int:
        """How many requests have come since the last call."""
        now = self.tally.arrived(slot)
        before, self._arrived[slot] = self._arrived.get(slot, 0), now
        return now - before

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    async def end(self, timeout_s: float) -> int:
        """Its exit status, negative for the signal that killed it: ours, when it has not ended within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.process.wait()
        except TimeoutError:
            self.kill()
            return await self.process.wait()
