"""The asyncio side of systemd: model units, jobs awaited by signal, one connection that heals itself.

Every call goes to a D-Bus worker process (see `mmd.systemd.worker` for why), so nothing here blocks the event loop. For the
system's manager it is reached by mmd-unit-broker.socket, since the gateway itself has no rights there; for a user's own it is a
child. When the connection is lost, calls and jobs in flight fail with SystemdDisconnectedError, since nobody knows whether they
were carried out; later calls wait up to RECONNECT_WAIT_S for the next connection. After SystemdDisconnectedError,
SystemdTimeoutError and the event Connected: read again, never repeat.
"""

import asyncio
import contextlib
import json
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from mmd.systemd.errors import (
    NO_REPLY,
    SystemdDisconnectedError,
    SystemdError,
    SystemdNoSuchUnitError,
    SystemdTimeoutError,
    systemd_error,
)
from mmd.systemd.unit import Connected, Disconnected, Event, JobResult, UnitChanged, UnitState

__all__ = ["RECONNECT_WAIT_S", "Systemd"]

RECONNECT_WAIT_S: Final = 5.0
"""How long a call waits for a lost connection: after a kill of dbus-daemon the next one is there in 0.3 to 0.6 s."""

# Back-off between attempts to connect: a bus that is being restarted is back at once, one that is gone need not be hammered.
_FIRST_DELAY_S: Final = 0.1
_MAX_DELAY_S: Final = 2.0

# How long a new worker may take until it is subscribed: D-Bus gives up after 25 s, systemd may be busy with a reload.
_OPEN_TIMEOUT_S: Final = 30.0

# How long a call may take: the 25 s of D-Bus, and as much again for the calls before it.
_CALL_TIMEOUT_S: Final = 50.0

# How long a worker may take to exit after its socket was closed: it may be inside a call.
_EXIT_TIMEOUT_S: Final = 1.0

# The longest line from the worker; a list of a thousand units is shorter.
_MAX_FRAME_BYTES: Final = 1 << 20


@dataclass(slots=True)
class _Call:
    """A call that waits for its reply. None stands for: the connection was lost."""

    reply: asyncio.Future[dict[str, Any] | None]
    job: asyncio.Future[JobResult | None] | None = None


class _Connection:
    """One worker process, that is, one D-Bus connection. It can be lost but not repaired."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        process: Process | None,
        on_changed: Callable[[UnitState], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Done, with the reason, when the connection is gone."""
        self._writer = writer
        self._process = process
        self._on_changed = on_changed
        self._ids = count(1)
        self._calls: dict[int, _Call] = {}
        self._jobs: dict[str, asyncio.Future[JobResult | None]] = {}  # until systemd removes the job, awaited or not
        self._receiver = self._loop.create_task(self._receive(reader), name="systemd worker")

    @classmethod
    async def open(cls, broker: Path | None, *, on_changed: Callable[[UnitState], None]) -> "_Connection":
        """A connection that is subscribed; SystemdDisconnectedError when there is no bus, or nothing to open it with."""
        try:
            connection = cls(*await (_spawn() if broker is None else _connect(broker)), on_changed)
        except OSError as error:  # of any kind: out of descriptors or of processes, too
            where = "start the D-Bus worker" if broker is None else f"connect to {broker}"
            raise SystemdDisconnectedError(f"cannot {where}: {error.strerror or error}") from error
        try:
            await asyncio.wait(
                (connection.ready, connection.lost), timeout=_OPEN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if connection.ready.done():
                return connection
            reason = connection.lost.result() if connection.lost.done() else f"no answer in {_OPEN_TIMEOUT_S:.0f} s"
            raise SystemdDisconnectedError(f"cannot connect to systemd: {reason}")
        except (SystemdError, asyncio.CancelledError):
            await connection.close()
            raise

    @property
    def pending(self) -> int:
        return len(self._calls) + len(self._jobs)

    async def call(self, name: str, *, unit: str = "", **arguments: object) -> Any:
        """The value that systemd returns."""
        reply, _ = await self._exchange(name, unit, **arguments)
        return reply["value"]

    async def job(self, name: str, unit: str) -> JobResult:
        """How the job that systemd made of this call ended."""
        _, job = await self._exchange(name, unit)
        assert job is not None, "the worker answers a job method with a job"
        await asyncio.wait((job,))  # not `await job`: others may wait for the same job, and a cancellation is not theirs
        result = job.result()
        if result is None:
            raise SystemdDisconnectedError(f"the connection to systemd was lost during {name} of {unit}", unit=unit)
        return result

    async def _exchange(
        self, name: str, unit: str, **arguments: object
    ) -> tuple[dict[str, Any], asyncio.Future[JobResult | None] | None]:
        what = f"{name} {unit}".rstrip()
        if self.lost.done():
            raise SystemdDisconnectedError(f"no connection to systemd for {what}: {self.lost.result()}", unit=unit)
        number, call = next(self._ids), _Call(self._loop.create_future())
        self._calls[number] = call
        try:
            request = {"id": number, "call": name, **({"unit": unit} if unit else {}), **arguments}
            self._writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                reply = await call.reply
        except TimeoutError:
            raise SystemdTimeoutError(f"{what}: no answer from systemd in {_CALL_TIMEOUT_S:.0f} s", unit=unit) from None
        finally:
            self._calls.pop(number, None)
        if reply is None:
            raise SystemdDisconnectedError(f"the connection to systemd was lost during {what}", unit=unit)
        if "error" in reply:
            raise systemd_error(reply["error"], f"{what}: {reply['message']}", unit=unit)
        return reply, call.job

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        reason = "the D-Bus worker exited"
        try:
            while line := await reader.readline():
                frame = json.loads(line)
                reason = frame.get("lost", reason)
                self._handle(frame)
        except (OSError, ValueError) as error:  # ValueError: a line that is too long, or no JSON
            reason = f"the D-Bus worker exited: {error}"
        finally:
            self.lost.set_result(reason)
            for call in self._calls.values():
                if not call.reply.done():
                    call.reply.set_result(None)
            for job in self._jobs.values():
                job.set_result(None)
            self._jobs.clear()

    def _handle(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"id": number}:
                self._replied(number, frame)
            case {"job_removed": job, "result": result}:
                future = self._jobs.pop(job, None)
                if future is not None:
                    future.set_result(JobResult(result))
            case {"changed": state}:
                self._on_changed(UnitState.from_json(state))
            case {"ready": True}:
                self.ready.set_result(None)

    def _replied(self, number: int, frame: dict[str, Any]) -> None:
        call = self._calls.get(number)
        if call is None or call.reply.done():  # its caller was cancelled
            return
        if "job" in frame:
            # Here and not in the caller, who runs later: the job may end in the next line.
            call.job = self._jobs.setdefault(frame["job"], self._loop.create_future())
        call.reply.set_result(frame)

    async def close(self) -> None:
        """Close the socket, which ends the worker, and wait until it has gone."""
        self._writer.close()
        self._receiver.cancel()
        await asyncio.wait((self._receiver,))
        if self._process is None:  # systemd's
            return
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


_Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter, Process | None]


async def _connect(broker: Path) -> _Opened:
    """systemd starts a worker for this connection."""
    return (*await asyncio.open_unix_connection(broker, limit=_MAX_FRAME_BYTES), None)


async def _spawn() -> _Opened:
    """A worker of our own, with our rights."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            command = (sys.executable, "-I", "-m", "mmd.systemd.worker")
            process = await asyncio.create_subprocess_exec(*command, stdin=theirs.fileno(), stdout=DEVNULL)
        except BaseException:
            ours.close()
            raise
    return (*await asyncio.open_unix_connection(sock=ours, limit=_MAX_FRAME_BYTES), process)


class Systemd:
    """A service manager: root's (the system bus) or the caller's own (`systemctl --user`).

    Calls raise SystemdError: its subclasses tell apart a missing right, a missing or masked unit, a call without an answer and
    a lost connection. Jobs are made with mode `replace`. A job is awaited without a bound, since the unit has its own; give it
    one with asyncio.timeout: to cancel the wait does not cancel the job.
    """

    def __init__(self, *, broker: Path | None, on_event: Callable[[Event], None]) -> None:
        """Use `connect`."""
        self._broker = broker
        self._on_event = on_event
        self._up = asyncio.Event()
        self._reason = "not connected yet"
        self._connection: _Connection
        self._supervisor: asyncio.Task[None]

    @classmethod
    async def connect(cls, *, broker: Path | None, on_event: Callable[[Event], None]) -> "Systemd":
        """Connect and subscribe; SystemdDisconnectedError when that fails at the first attempt.

        `broker` is the socket of mmd-unit-broker.socket, which leads to the system's manager; None means the caller's own.
        `on_event` is called in the event loop, for each change of a model unit and when the connection is lost (Disconnected)
        and found again (Connected); not for this first connection.
        """
        systemd = cls(broker=broker, on_event=on_event)
        systemd._connection = await systemd._open()
        systemd._up.set()
        systemd._supervisor = asyncio.create_task(systemd._supervise(), name="systemd connection")
        return systemd

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def pending(self) -> int:
        """Calls without a reply and jobs without a result."""
        return self._connection.pending

    async def list_models(self) -> tuple[UnitState, ...]:
        """Every model unit that systemd has loaded, running or failed or not; a unit that was never started is not loaded."""
        return tuple(UnitState.from_json(state) for state in await self._query("list"))

    async def read(self, unit: str) -> UnitState:
        """The unit's state; one without a unit file has the load state `not-found`."""
        return UnitState.from_json(await self._query("read", unit=unit))

    async def start(self, unit: str) -> JobResult:
        return await (await self._current()).job("start", unit)

    async def stop(self, unit: str) -> JobResult:
        return await (await self._current()).job("stop", unit)

    async def restart(self, unit: str) -> JobResult:
        return await (await self._current()).job("restart", unit)

    async def kill(self, unit: str, *, signal: int, whom: str = "all") -> None:
        """Send a signal that ends processes to the unit's: `main`, `control` or `all` of them."""
        await (await self._current()).call("kill", unit=unit, whom=whom, signal=signal)

    async def reset_failed(self, unit: str) -> None:
        """Forget that the unit failed and how often it was started; one that is not loaded has nothing to forget."""
        with contextlib.suppress(SystemdNoSuchUnitError):
            await (await self._current()).call("reset_failed", unit=unit)

    async def processes(self, unit: str) -> tuple[int, ...]:
        """The PIDs in the unit's control group; none when it does not run."""
        try:
            return tuple(await self._query("processes", unit=unit))
        except SystemdNoSuchUnitError:
            return ()

    async def close(self) -> None:
        """End the worker. Calls in flight fail with SystemdDisconnectedError."""
        self._up.clear()
        self._reason = "closed"
        self._supervisor.cancel()
        await asyncio.wait((self._supervisor,))
        await self._connection.close()

    async def _query(self, name: str, *, unit: str = "") -> Any:
        """A call that changes nothing, so it is repeated when systemd left the bus without an answer: a daemon-reexec."""
        try:
            return await (await self._current()).call(name, unit=unit)
        except SystemdTimeoutError as error:
            if error.name != NO_REPLY:
                raise
        return await (await self._current()).call(name, unit=unit)

    async def _open(self) -> _Connection:
        return await _Connection.open(self._broker, on_changed=lambda state: self._emit(UnitChanged(state)))

    async def _current(self) -> _Connection:
        try:
            async with asyncio.timeout(RECONNECT_WAIT_S):
                await self._up.wait()
        except TimeoutError:
            raise SystemdDisconnectedError(f"no connection to systemd: {self._reason}") from None
        return self._connection

    async def _supervise(self) -> None:
        """Replace each lost connection by a new one."""
        loop = asyncio.get_running_loop()
        delay_s = _FIRST_DELAY_S
        while True:
            opened = loop.time()
            self._reason = await asyncio.shield(self._connection.lost)
            self._up.clear()
            self._emit(Disconnected(self._reason))
            await self._connection.close()
            if loop.time() - opened > _MAX_DELAY_S:  # else it is a connection that does not last: keep backing off
                delay_s = _FIRST_DELAY_S
            self._connection, delay_s = await self._reopen(delay_s)
            self._up.set()
            self._emit(Connected())

    async def _reopen(self, delay_s: float) -> tuple[_Connection, float]:
        """A new connection, however long it takes, and the delay before the attempt after it."""
        while True:
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
            try:
                return await self._open(), delay_s
            except SystemdDisconnectedError as error:
                self._reason = error.message

    def _emit(self, event: Event) -> None:
        # By way of the loop: what a callback raises is its own affair and must not end the connection.
        asyncio.get_running_loop().call_soon(self._on_event, event)
