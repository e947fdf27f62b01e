"""A worker: a process that relays inference requests on listening sockets that it shares with others, by leases from the
process that decides. Its standard input is the channel to that process, without which it ends.

Connections that ask for something else than inference go to the deciding process as they are, and come back afterwards.
"""

import asyncio
import gc
import logging
import os
import pickle
import signal
import socket
from collections.abc import Coroutine
from typing import Any

import msgspec
import uvloop

from mmd.gateway.channel import Channel, connection_of, from_memory, in_memory
from mmd.gateway.log import log_to_journal
from mmd.gateway.relay.inference import Inference
from mmd.gateway.requests import cancel, requests_on
from mmd.gateway.server import Server
from mmd.gateway.workers.messages import (
    Accept,
    Begin,
    CancelRequest,
    Configured,
    Connection,
    Counted,
    Finish,
    Found,
    Keyed,
    KeysKnown,
    Leave,
    ListRequests,
    Pulse,
    ToWorker,
)
from mmd.gateway.workers.tally import Tally
from mmd.gateway.workers.tenant import Tenant
from mmd.status import RequestStatus

_log = logging.getLogger("mmd.gateway")

_PULSE_S = 1.0

# While it leaves, the deciding process waits for its last connection.
_LEAVING_PULSE_S = 0.05


class Worker:
    def __init__(self, channel: Channel, tally: int, config: int, *sockets: int) -> None:
        """Descriptors, see `Begin`."""
        self.over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._channel = channel
        self._tenant = Tenant(Tally(tally), channel.send)
        os.close(tally)
        self._configure(config)
        self._inference = Inference(self._tenant)
        listening = [socket.socket(fileno=each) for each in sockets]
        self._server = Server("worker", self._inference, listening, elsewhere=self._give, worker=True)
        self._leaving = False
        self._finishing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._keep_pulse())

    def _configure(self, memory: int) -> None:
        self._tenant.configure(pickle.loads(from_memory(memory)))  # noqa: S301 - its only writer is our parent

    def hear(self, message: ToWorker, fds: list[int]) -> None:
        match message:
            case Accept():
                self._spawn(self._server.start())
            case Configured():
                self._configure(fds[0])
            case Keyed():
                self._inference.access.use(pickle.loads(from_memory(fds[0])))  # noqa: S301 - as above
                self._channel.send(KeysKnown())
            case Connection(chunked):
                self._spawn(self._server.adopt(*connection_of(fds), chunked))
            case Leave():
                self._leaving = True
                self._server.hand_over(self._hand_over)
            case Finish(timeout_s):
                self.finish(timeout_s)
            case ListRequests(number):
                self._tell(number, requests_on(self._server.connections, self._loop.time()))
            case CancelRequest(number, request):
                self._tell(number, cancel(self._server.connections, request, self._loop.time()))
            case Begin():
                raise AssertionError("it has begun")
            case _:
                self._tenant.hear(message)

    def _tell(self, number: int, requests: list[RequestStatus]) -> None:
        self._channel.send(Found(number), in_memory(msgspec.json.encode(requests)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """The boundary of a task: a worker in which one fails is of no use, and another one takes its place."""
        try:
            await work
        except Exception:
            _log.exception("a worker gives up")
            self.over.set()

    async def _keep_pulse(self) -> None:
        while True:
            self.pulse()
            await asyncio.sleep(_LEAVING_PULSE_S if self._leaving else _PULSE_S)

    def pulse(self) -> None:
        """Say that we turn, and what came since the last time."""
        counters, self._inference.counters = self._inference.counters, {}
        counted = {name: Counted.of(each) for name, each in counters.items()}
        self._channel.send(Pulse(len(self._server.connections), counted))

    def _give(self, connection: int, read: bytes, chunked: bool | None = None) -> None:
        self._channel.send_connection(Connection(chunked), connection, read)

    def _hand_over(self, connection: int, read: bytes, chunked: bool | None, _: bool) -> None:
        self._give(connection, read, chunked)

    def finish(self, timeout_s: float | None = None) -> None:
        """Accept nothing more, and end when what was accepted is answered."""
        if not self._finishing:
            self._finishing = True
            self._spawn(self._finish(self._tenant.config.gateway.drain_timeout_s if timeout_s is None else timeout_s))

    async def _finish(self, timeout_s: float) -> None:
        await self._server.stop_accepting()
        await self._server.drain(timeout_s)
        self.pulse()
        self.over.set()


async def _run(end: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    orphaned = asyncio.Event()
    begun: asyncio.Future[Worker] = loop.create_future()

    def hear(message: ToWorker, fds: list[int]) -> None:
        if isinstance(message, Begin):
            try:
                begun.set_result(Worker(channel, *fds))
            except Exception:  # such as a configuration of another version, between an installation and the reload after it
                _log.exception("a worker cannot begin")
                orphaned.set()
        elif begun.done():
            begun.result().hear(message, fds)

    channel = Channel(end, ToWorker, hear, orphaned.set)
    loop.add_signal_handler(signal.SIGTERM, lambda: begun.result().finish() if begun.done() else orphaned.set())
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the deciding process gets it as well, and knows what to do
    gone = loop.create_task(orphaned.wait())
    await asyncio.wait((begun, gone), return_when=asyncio.FIRST_COMPLETED)
    if begun.done():
        gc.freeze()
        await asyncio.wait((gone, loop.create_task(begun.result().over.wait())), return_when=asyncio.FIRST_COMPLETED)
    channel.close()


def main() -> None:
    log_to_journal()
    uvloop.run(_run(socket.socket(fileno=os.dup(0))))


if __name__ == "__main__":
    main()
