"""The workers of a gateway: started, listened to, given connections, replaced when they die."""

import asyncio
import io
import logging
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final

from mmd.config import Config
from mmd.gateway.channel import connection_of, in_memory
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.relay.inference import Inference
from mmd.gateway.serving import Heir
from mmd.gateway.workers.census import Census
from mmd.gateway.workers.desk import Desk
from mmd.gateway.workers.lessor import Lessor
from mmd.gateway.workers.messages import (
    Accept,
    Begin,
    Configured,
    Connection,
    Drained,
    Finish,
    Found,
    Kept,
    Keyed,
    KeysKnown,
    Leave,
    Pulse,
    Revoked,
    ToDecider,
)
from mmd.gateway.workers.process import WorkerProcess
from mmd.names import UnitName

__all__ = ["Staff"]

_log = logging.getLogger(__name__)

Adopt = Callable[[socket.socket, bytes, bool | None], Coroutine[Any, Any, None]]
"""As `mmd.gateway.server.Server.adopt`."""

# How stale the scheduler's idea may be of what is in flight. What it acts upon is exact: it recalls the lease first.
_SURVEY_S: Final = 0.25

# A worker says once a second that it turns.
_SILENT_S: Final = 20.0
_PREPARED_WITHIN_S: Final = 20.0

# One that dies is replaced at once; one that keeps dying at ever longer intervals.
_LIVED_S: Final = 10.0
_DELAY_S: Final = 0.5
_DELAY_MAX_S: Final = 5.0
_END_WITHIN_S: Final = 5.0
_POLL_S: Final = 0.02

# A worker looks at its channel a thousand times a second; mmdctl waits for 10 s.
_KEYED_WITHIN_S: Final = 5.0
_KEYED_POLL_S: Final = 0.002


class Staff:
    """All workers. They share `sockets`, and let through only what the dispatcher lends them or lets through itself."""

    def __init__(self, dispatcher: Dispatcher, inference: Inference, name: str, sockets: Sequence[socket.socket]) -> None:
        """`inference`: where what they relayed is counted; `name`: the server's whose sockets they share."""
        self.name = name
        self.adopt: Adopt | None = None
        """Serves a connection that asks for something else than inference: that server's."""
        self._dispatcher = dispatcher
        self._inference = inference
        self._sockets = tuple(sockets)
        self._loop = asyncio.get_running_loop()
        self._workers: list[WorkerProcess] = []
        self._desks: dict[WorkerProcess, Desk] = {}
        self._lessor = Lessor(dispatcher, self._workers)
        self.census = Census(self._workers)
        self._accepting = False
        self._ending = False
        self._heir: Heir | None = None
        self._delay_s = 0.0
        self._homeless: deque[tuple[int, bytes, bool | None]] = deque()
        """Connections that came while there was no worker."""
        self._timer: asyncio.TimerHandle | None = None
        self._burials: set[asyncio.Task[None]] = set()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    async def prepare(self, count: int) -> None:
        """Start `count` workers, which accept nothing yet."""
        self._dispatcher.lend_to(self._lessor)
        await asyncio.gather(*(self._hire() for _ in range(count)))
        self._watch()
        with suppress(TimeoutError):  # those that come later serve later
            async with asyncio.timeout(_PREPARED_WITHIN_S):
                for worker in tuple(self._workers):
                    await worker.prepared.wait()

    def accept(self) -> None:
        self._accepting = True
        for worker in self._workers:
            worker.say(Accept())

    async def _hire(self) -> None:
        try:
            worker = await WorkerProcess.start(self._hear, self._lose)
        except OSError as error:
            _log.error("cannot start a worker: %s", error)
            self._replace()
            return
        self._workers.append(worker)
        self._desks[worker] = Desk(self._dispatcher, worker)
        shared = (os.dup(each.fileno()) for each in self._sockets)
        worker.say(Begin(), worker.tally_descriptor, _pickled(self._dispatcher.config), *shared)
        self._tell_keys(worker)
        self._lessor.inform(worker)
        if self._accepting:
            worker.say(Accept())

    def _lose(self, worker: WorkerProcess) -> None:
        """It has died, or ended as it was told."""
        self._workers.remove(worker)
        self._desks.pop(worker).close()
        self._lessor.forget(worker)
        self.census.forget(worker)
        burial = self._loop.create_task(self._bury(worker))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)
        if not self._ending:
            if self._loop.time() - worker.since > _LIVED_S:
                self._delay_s = 0.0
            self._replace()

    async def _bury(self, worker: WorkerProcess) -> None:
        status = await worker.end(_END_WITHIN_S)
        if not self._ending:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            _log.warning("worker %d %s; another one takes its place", worker.pid, how)

    def _replace(self) -> None:
        async def later(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            if not self._ending:
                await self._hire()

        self._dispatcher.spawn(later(self._delay_s))
        self._delay_s = min(_DELAY_MAX_S, max(_DELAY_S, 2 * self._delay_s))

    def configure(self, config: Config) -> None:
        for worker in self._workers:
            worker.say(Configured(), _pickled(config))

    def tell_keys(self) -> None:
        """Other API keys are in force: what is sent to a worker after this, it judges by them."""
        for worker in self._workers:
            self._tell_keys(worker)

    def _tell_keys(self, worker: WorkerProcess) -> None:
        worker.keys_asked += 1
        worker.say(Keyed(), in_memory(pickle.dumps(self._inference.access.ring)))

    async def keys_known(self) -> None:
        """Return when every worker goes by the API keys that it was told of; one that does not answer is killed."""
        asked = {worker: worker.keys_asked for worker in self._workers}
        begun = self._loop.time()
        while late := [each for each, number in asked.items() if each in self._workers and each.keys_known < number]:
            if self._loop.time() - begun > _KEYED_WITHIN_S:
                for worker in late:
                    _log.error("worker %d goes on by API keys that are no more, and is killed", worker.pid)
                    worker.kill()
                return
            await asyncio.sleep(_KEYED_POLL_S)

    def leave(self, heir: Heir) -> None:
        """Another gateway accepts: send it all connections, see Server.hand_over."""
        self._ending, self._heir = True, heir
        for worker in self._workers:
            worker.connections = None
            worker.say(Leave())

    @property
    def left(self) -> bool:
        """Whether no worker has a connection any more."""
        return all(worker.connections == 0 for worker in self._workers)

    async def finish(self, timeout_s: float) -> None:
        """Let them answer what they have accepted, for `timeout_s` at most, and end."""
        self._ending, self._heir = True, None
        for worker in self._workers:
            worker.say(Finish(timeout_s))
        begun = self._loop.time()
        while self._workers and self._loop.time() - begun < timeout_s + _END_WITHIN_S:  # noqa: ASYNC110 - as they go
            await asyncio.sleep(_POLL_S)
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*self._burials)  # a gateway that has ended leaves no process behind
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        now = self._loop.time()
        self._timer = self._loop.call_later(_SURVEY_S, self._watch)
        self._lessor.survey()
        for worker in self._workers:
            if now - worker.heard > _SILENT_S:
                _log.error("worker %d has been silent for %g s, and is killed", worker.pid, _SILENT_S)
                worker.heard = now
                worker.kill()

    def _hear(self, worker: WorkerProcess, message: ToDecider, fds: list[int]) -> None:
        match message:
            case Pulse():
                self._hear_pulse(worker, message)
            case Revoked(unit):
                parsed = UnitName.parse(unit)
                assert parsed is not None, unit
                self._lessor.revoked(worker, parsed)
            case Found():
                self.census.hear(worker, message, fds)
            case KeysKnown():
                worker.keys_known += 1
            case Drained():
                self._lessor.survey()
            case Kept(answer, model):
                self._dispatcher.kept().add(answer, model)
            case Connection(chunked):
                self._take(*connection_of(fds), chunked)
            case _:
                self._desks[worker].hear(message)

    def _hear_pulse(self, worker: WorkerProcess, pulse: Pulse) -> None:
        worker.heard, worker.connections = self._loop.time(), pulse.connections
        for name, counted in pulse.counters.items():
            self._inference.counters_of(name).add(counted.counters())
        if not worker.prepared.is_set():
            worker.prepared.set()
            while self._homeless:
                worker.give(*self._homeless.popleft())

    def _take(self, connection: socket.socket, read: bytes, chunked: bool | None) -> None:
        """A connection that a worker has no use for."""
        if self._heir is not None:
            self._heir(connection.detach(), read, chunked, False)
        else:
            assert self.adopt is not None
            self._dispatcher.spawn(self.adopt(connection, read, chunked))

    def give(self, connection: int, read: bytes, chunked: bool | None = None) -> None:
        """Let a worker serve a connection."""
        ready = [worker for worker in self._workers if worker.prepared.is_set()]
        if ready:
            min(ready, key=lambda worker: worker.connections or 0).give(connection, read, chunked)
        else:
            self._homeless.append((connection, read, chunked))


class _Pickler(pickle.Pickler):
    """Pickle knows no read-only mappings, which a configuration is made of: they arrive as dictionaries."""

    def reducer_override(self, value: Any) -> Any:
        return (dict, (dict(value),)) if isinstance(value, MappingProxyType) else NotImplemented


def _pickled(config: Config) -> int:
    """A descriptor of a memory file."""
    data = io.BytesIO()
    _Pickler(data).dump(config)
    return in_memory(data.getvalue())
