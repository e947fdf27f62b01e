"""How much of a resource is free: what commands say of named ones, and the kernel of the host's memory.

Nothing waits for a gauge. Each runs in a task of its own, one command at a time; what it said last stays in force while it is
slow or fails. Before it has said anything, models that need its resource wait; a gauge whose first try fails limits nothing.

`ram: auto` is what the host has, less what others use of it and a reserve: MemAvailable (proc(5)) is the kernel's
estimate and counts caches as free that running engines may need, and what is read every other second is late. Engines that
swap are worse than one that was stopped too early.
"""

import asyncio
import logging
import math
import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from mmd.config import Config, Gauge, Provider
from mmd.errors import MmdError
from mmd.policy.events import Gauged
from mmd.policy.ledger import RAM
from mmd.quantity import SIZE_PATTERN, human_duration, parse_size
from mmd.shortage import is_shortage

__all__ = ["Gauges", "host_ram_bytes"]

_log = logging.getLogger(__name__)

_RAM_INTERVAL_S = 2.0
_RAM_RESERVE_SHARE = 0.05
_RAM_RESERVE_MAX_BYTES = 4 << 30
_MEMINFO = Path("/proc/meminfo")

# A command that is run more often than this may take longer all the same: disks that have to spin up, a server far away.
_PATIENCE_S = 5.0
# Output is read when the command has ended; whoever prints more than a pipe holds (pipe(7)) waits until it is killed.
_PIPE_BYTES = 65536
# How long one that was killed may take to be gone when its gauge ends; one that hangs in the kernel is not waited for.
_GONE_S = 1.0
# What was read while a model took or gave back some says nothing: ask again, at the latest after this long.
_AGAIN_S = 1.0

_NUMBER = re.compile(r"-?[0-9]{1,18}(?:\.[0-9]{1,9})?")
_SIZE = re.compile(SIZE_PATTERN)

# Variables of the gateway alone: systemd's, and the one by which mmd.gateway.main keeps OpenSSL from reading all certificates.
_OWN_VARIABLES = (("NOTIFY_SOCKET", None), ("WATCHDOG_PID", None), ("WATCHDOG_USEC", None), ("SSL_CERT_FILE", os.devnull))

_UNANSWERED = "it has not told yet how much is free; models that need it wait"


class _Watch(NamedTuple):
    """A gauge that is read again and again; no `gauge`: the host's memory."""

    gauge: Gauge | None
    task: "asyncio.Task[None]"


class Gauges:
    """Reads what the configuration asks for, as far as some model of it needs it; `on_reading` is told.

    `stand` says who holds some of a resource: a reading during which that changed is not passed on, since nobody knows whether
    it was taken before or after.
    """

    def __init__(self, stand: Callable[[str], Hashable], on_reading: Callable[[Gauged], None]) -> None:
        self._stand = stand
        self._on_reading = on_reading
        self._watches: dict[str, _Watch] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._answered: set[str] = set()
        self.problems: dict[str, str] = {}
        """By resource: why its gauge does not tell, and what is in force meanwhile."""
        self.sizes: set[str] = set()
        """Resources whose commands tell sizes."""

    def use(self, config: Config) -> None:
        """Read what this configuration asks for from now on, and nothing else."""
        wanted = _wanted(config)
        for name, watch in list(self._watches.items()):
            if name not in wanted or wanted[name] != watch.gauge:
                self._end(name)
        for name in wanted.keys() - self._watches.keys():
            gauge = wanted[name]
            if gauge is not None:
                self.problems[name] = _UNANSWERED
            work = self._watch_ram() if gauge is None else self._watch_command(name, gauge)
            self._watches[name] = _Watch(gauge, asyncio.create_task(work))

    def _end(self, name: str) -> None:
        task = self._watches.pop(name).task
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        self._answered.discard(name)
        self.sizes.discard(name)
        self.problems.pop(name, None)

    async def close(self) -> None:
        """End all gauges, with their commands."""
        for name in list(self._watches):
            self._end(name)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _watch_ram(self) -> None:
        async def read() -> float:
            return _available_ram_bytes()

        await self._watch(RAM, read, _RAM_INTERVAL_S)

    async def _watch_command(self, name: str, gauge: Gauge) -> None:
        command = _Command(gauge)
        try:
            await self._watch(name, command.ask, gauge.interval_s)
        finally:
            await command.end()

    async def _watch(self, name: str, read: Callable[[], Awaitable[float]], interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun, stand = loop.time(), self._stand(name)
            pause_s = interval_s
            try:
                free = await read()
            except Exception as error:
                if is_shortage(error):  # of our own: it says nothing about the resource, so what is in force stays
                    _log.warning("resource %s: not read this time: %s", name, error)
                else:
                    if not isinstance(error, MmdError | OSError):
                        _log.exception("resource %s cannot be read", name)
                    self._failed(name, str(error))
            else:
                self._told(name, free)
                if self._stand(name) == stand:
                    self._on_reading(Gauged(name, free))
                else:
                    pause_s = min(interval_s, _AGAIN_S)
            await asyncio.sleep(max(0.0, begun + pause_s - loop.time()))

    def _told(self, name: str, free: float) -> None:
        if self.problems.pop(name, _UNANSWERED) != _UNANSWERED:
            _log.info("resource %s: its gauge works again", name)
        self._answered.add(name)
        if isinstance(free, int):
            self.sizes.add(name)

    def _failed(self, name: str, why: str) -> None:
        """Say so once, however long it goes on."""
        answered = name in self._answered
        meanwhile = "what it told last stays in force" if answered else "until it tells, it limits nothing"
        if self.problems.get(name, _UNANSWERED) == _UNANSWERED:
            _log.warning("resource %s: %s; %s", name, why, meanwhile)
        self.problems[name] = f"{why}; {meanwhile}"
        if not answered:
            self._on_reading(Gauged(name, math.inf))


def _wanted(config: Config) -> dict[str, Gauge | None]:
    """The gauges that a configuration asks for, by resource."""
    needed = {name for model in config.models.values() for name in model.resources}
    commands = {name: gauge for name, gauge in config.resources.commands.items() if name in needed}
    measured = config.resources.ram_bytes is None and config.gpus.provider is not Provider.SIM
    return {**commands, **({RAM: None} if measured else {})}


class _Command:
    """A gauge's command, with whatever it starts: a session of its own that ends with every answer."""

    def __init__(self, gauge: Gauge) -> None:
        self._argv = gauge.command
        self._timeout_s = max(gauge.interval_s, _PATIENCE_S)
        self._process: subprocess.Popen[bytes] | None = None

    async def ask(self) -> float:
        """What it prints, bytes as an int or a number as a float; MmdError."""
        if self._process is not None:
            await _reaped(self._process)  # killed, yet perhaps stuck in the kernel (a file server that is gone)
        program = self._argv[0]
        try:
            process = self._process = _start(self._argv)
        except OSError as error:
            raise MmdError(f"{program} cannot be run: {error.strerror}") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                await _ended(process)
        except TimeoutError:
            stuck = len(_read(process.stdout)) > _PIPE_BYTES / 2  # not each of its pages need be full
            why = "it prints more than 64 KiB" if stuck else f"no answer within {human_duration(self._timeout_s)}"
            raise MmdError(f"{program}: {why}") from None
        else:
            output, complaint = _last_line(_read(process.stdout)), _last_line(_read(process.stderr))
        finally:
            _kill(process)
        if (status := await _reaped(process)) != 0:
            ending = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
            raise MmdError(f"{program}: {ending}{complaint and f': {complaint}'}")
        return _amount(program, output)

    async def end(self) -> None:
        """See the last run gone."""
        if self._process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GONE_S):
                    await _reaped(self._process)


def _start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """By vfork(2), as subprocess does it: the event loop's own way copies the gateway's page tables, some milliseconds."""
    environment = {k: v for k, v in os.environ.items() if not {(k, v), (k, None)} & set(_OWN_VARIABLES)}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(argv, stdin=null, stdout=pipe, stderr=pipe, env=environment, start_new_session=True)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended. Its process id stays taken until it is reaped, so that `_kill` means nobody else."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _reaped(process: subprocess.Popen[bytes]) -> int:
    """The exit status, as soon as there is one."""
    if process.returncode is None:
        await _ended(process)
    return process.wait()


def _read(pipe: IO[bytes] | None) -> bytes:
    """What a pipe holds at this moment."""
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)  # somebody who has left the session may keep it open for ever
    with suppress(BlockingIOError):
        return os.read(pipe.fileno(), _PIPE_BYTES)
    return b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a session, and its output."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _amount(program: str, line: str) -> float:
    if _NUMBER.fullmatch(line):
        return float(line)
    if _SIZE.fullmatch(line):
        return parse_size(line)
    said = f"{line[:100]!r}, which is neither a number nor a size such as 18GiB" if line else "nothing"
    raise MmdError(f"{program} printed {said}")


def host_ram_bytes(config: Config) -> float:
    """What models may have of the host's memory at most, when resources.ram does not say it; simulated ones take none of it."""
    if config.gpus.provider is Provider.SIM:
        return math.inf
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total - _ram_reserve_bytes(total)


def _ram_reserve_bytes(total: int) -> int:
    return min(int(total * _RAM_RESERVE_SHARE), _RAM_RESERVE_MAX_BYTES)


def _available_ram_bytes() -> int:
    """What programs may take without swapping, less the reserve."""
    try:
        found = dict(re.findall(r"^(\w+): +(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE))
        total, available = (int(found[key]) << 10 for key in ("MemTotal", "MemAvailable"))
    except OSError as error:
        raise MmdError(f"{_MEMINFO} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise MmdError(f"{_MEMINFO} does not tell {error}") from None
    return available - _ram_reserve_bytes(total)
