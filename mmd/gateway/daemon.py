"""The gateway's parts put together: start, reload, stop."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mmd import __version__
from mmd.config import Config, EngineKind
from mmd.errors import MmdError
from mmd.events import GatewayReplaced, GatewayStarted, Reloaded
from mmd.gateway.admin import AdminApi
from mmd.gateway.admin.registry import RegistryRoutes
from mmd.gateway.admin_access import AdminAccess
from mmd.gateway.answer_book import AnswerBook
from mmd.gateway.application import ApplicationServer
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.gauges import Gauges, host_ram_bytes
from mmd.gateway.handover import Predecessor
from mmd.gateway.keeper import Keeper
from mmd.gateway.lesson_book import LessonBook
from mmd.gateway.lifecycle import Lifecycle
from mmd.gateway.memory import Memory
from mmd.gateway.openai import OpenAiApi
from mmd.gateway.pin_book import PinBook
from mmd.gateway.ports import Ports, is_port
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.inference import Inference
from mmd.gateway.relief import Guests, relieve
from mmd.gateway.server import Door
from mmd.gateway.serving import Serving
from mmd.gateway.snapshot import Snapshot
from mmd.gateway.workers import worker_count
from mmd.gpu import GpuProvider, open_provider
from mmd.load import Loaded, load
from mmd.policy.events import Paused, Pinned, Sampled
from mmd.scope import Scope
from mmd.systemd.activation import ListenSocket
from mmd.systemd.client import Systemd
from mmd.systemd.unit import Connected, Disconnected, Event, UnitChanged
from mmd.units import definition

if TYPE_CHECKING:
    from mmd.gateway.workers.staff import Staff

__all__ = ["Daemon"]

_log = logging.getLogger(__name__)

# Belt and braces: signals are not lost while the bus is connected, but nothing here depends on that.
_RESYNC_S = 60.0

# How long nobody is served for want of a first look at the GPUs. Later only models that need one wait for it: a driver may take
# many seconds to answer, and what runs already needs none of it.
_FIRST_SAMPLE_S = 2.0


class Daemon:
    """One gateway. `runtime_dir` and `state_dir` outlive it, the latter the machine's next boot as well."""

    def __init__(
        self, scope: Scope, systemd: Systemd, *, runtime_dir: Path, state_dir: Path, sockets: Iterable[ListenSocket]
    ) -> None:
        self._scope = scope
        self._systemd = systemd
        sockets = tuple(sockets)
        self._sockets = tuple(each for each in sockets if not is_port(each.name))
        self._servers: list[Serving] = []
        self._staff: Staff | None = None
        self._background: list[asyncio.Task[None]] = []
        self._memory = Memory(self._open_gpus, self._on_sample)
        sleepers = runtime_dir / "sleepers.json"
        lifecycle = Lifecycle(
            scope, systemd, self._memory, sleepers, lambda unit: self.dispatcher.scheduler.state.model_of(unit)
        )
        self._book = LessonBook(state_dir / "lessons.sqlite")
        self._answers = AnswerBook(state_dir / "answers.sqlite")
        self._pins = PinBook(state_dir / "pins.json")
        self.dispatcher = Dispatcher(lifecycle, systemd, self._book)
        self.dispatcher.kept().inherit(self._answers.load())
        self.dispatcher.kept().told = self._answers.note
        self._gauges = Gauges(lambda name: self.dispatcher.scheduler.state.stand(name), self.dispatcher.post)
        self.inference = Inference(self.dispatcher)
        self._ports = Ports(self.dispatcher, self.inference, self._servers, runtime_dir / "ports.sock", sockets)
        self._guests = Guests(self.dispatcher, self._servers, self.inference.access)
        self.snapshot = Snapshot(self.dispatcher, self._memory, self._gauges, scope=scope.kind)
        self._keeper = Keeper(self.inference.access, self.snapshot)
        self._admin = AdminApi(
            self.dispatcher,
            self.snapshot,
            self._pins,
            scope,
            self.reload,
            connections=self._connections,
            census=lambda: None if self._staff is None else self._staff.census,
            more=(*RegistryRoutes(self.dispatcher, self.snapshot, scope).routes(), *self._keeper.routes()),
        )

    async def start(self, predecessor: Predecessor | None = None) -> None:
        """Read the configuration, adopt what runs, then accept requests: at once, or when `predecessor` hands over.

        MmdError when it is to take over with a configuration that has problems.
        """
        loaded = load(self._scope)
        self._keeper.load(os.environ)
        if predecessor is not None:
            if loaded.problems:
                raise MmdError(f"the configuration has problems: {loaded.problems[0]}", hint="mmdctl check")
            self._guests.welcome(predecessor)
            self.dispatcher.post(Paused(True))
        self._use(loaded)
        self._use_pins()
        await self.dispatcher.adopt()
        self._background = [asyncio.create_task(work) for work in (self._memory.watch(), self._watch_systemd())]
        self._gauges.use(self.dispatcher.config)
        await self._memory.first(_FIRST_SAMPLE_S)
        self._make_servers()
        if self._staff is not None:
            await self._staff.prepare(self.snapshot.workers)
        if predecessor is not None:
            predecessor.prepared()
            taken = await predecessor.taken
            self._use_pins()  # it may have been told of some since we began
            self._keeper.inherit(predecessor.keys)
            await self._guests.take_over(predecessor, taken)
        for server in self._servers:
            await server.start()
        if self._staff is not None:
            self._staff.accept()
        await self._ports.listen()
        how = "has started" if predecessor is None else "has taken over"
        pid, narrator = os.getpid(), self.dispatcher.narrator
        narrator.look()
        narrator.log.note(GatewayStarted(time.time(), f"mmd {__version__} {how}, pid {pid}", __version__, pid))

    def _make_servers(self) -> None:
        api = OpenAiApi(self.dispatcher)
        access = AdminAccess(lambda: self.dispatcher.config.gateway)
        admin = [(self._admin.definition(route), route.private) for route in self._admin.routes]
        on_socket = [access.on_socket(route) for route, _ in admin]
        over_tcp = [access.over_tcp(route, private=private) for route, private in admin]
        routes = {
            "mmd-api": (Door.API, api.routes()),
            "mmd-admin": (Door.ADMIN_SOCKET, [*api.routes(), *on_socket]),
            "mmd-admin-tcp": (Door.ADMIN_TCP, [*api.routes(), *over_tcp]),
        }
        self.snapshot.workers = worker_count(self.dispatcher.config.gateway.workers)
        for name, (door, found) in routes.items():
            sockets = [listening.socket for listening in self._sockets if listening.name == name]
            if not sockets:
                continue
            if self.snapshot.workers == 1 or name != "mmd-api":
                self._servers.append(ApplicationServer(name, self.inference, found, sockets, door=door))
                continue
            from mmd.gateway.workers.staff import Staff  # not imported for nothing: clients wait while a gateway starts

            staff = self._staff = self._keeper.staff = Staff(self.dispatcher, self.inference, name, sockets)
            server = ApplicationServer(name, self.inference, found, (), elsewhere=staff.give)
            staff.adopt = server.adopt
            self._servers.append(server)
        self._ports.prepare()

    def _connections(self) -> Iterator[ClientConnection]:
        """Clients' that are served in this process."""
        for server in self._servers:
            yield from (each for each in server.connections if isinstance(each, ClientConnection))

    def _use(self, loaded: Loaded) -> None:
        for problem in loaded.problems:
            _log.error("%s", problem)
        self.snapshot.problems, self.snapshot.loaded = tuple(map(str, loaded.problems)), loaded
        for warning in self.snapshot.warnings:
            _log.warning("%s", warning)
        self.dispatcher.reconfigure(loaded.config, _definitions(loaded.config), host_ram_bytes(loaded.config))

    def _use_pins(self) -> None:
        for model, pinned in self._pins.read().items():
            self.dispatcher.post(Pinned(model, pinned))

    async def reload(self) -> dict[str, list[str]]:
        """Read the configuration again; a broken one changes nothing. What changed, by model name, and what is wrong."""
        before, loaded = self.dispatcher.config, load(self._scope)
        if loaded.problems:
            for problem in loaded.problems:
                _log.error("%s; the configuration in use stays", problem)
            self.snapshot.problems = tuple(f"{problem} (the configuration in use stays)" for problem in loaded.problems)
            problems = list(map(str, loaded.problems))
            told = Reloaded(time.time(), f"the configuration has problems: {problems[0]}", problems=tuple(problems))
            self.dispatcher.narrator.log.note(told)
            return {"changed": [], "added": [], "removed": [], "problems": problems}
        self._use(loaded)
        self._gauges.use(loaded.config)
        if self._staff is not None:  # before anybody who waits for the change hears of it, and asks a worker
            self._staff.configure(loaded.config)
        await self._ports.arrange()
        if worker_count(loaded.config.gateway.workers) != self.snapshot.workers:
            os.kill(os.getpid(), signal.SIGUSR2)  # a fresh process has as many as it should
        if loaded.config.gpus != before.gpus:
            await self._memory.reopen()
        await self.dispatcher.resynchronise()
        self.snapshot.reloaded = time.time()
        changes = _differences(before, loaded.config)
        message = f"configuration reloaded: {', '.join(f'{len(names)} {kind}' for kind, names in changes.items())}"
        _log.info("%s", message)
        added, changed, removed = (tuple(changes[kind]) for kind in ("added", "changed", "removed"))
        self.dispatcher.narrator.log.note(Reloaded(time.time(), message, added, changed, removed))
        return {**changes, "problems": []}

    async def _open_gpus(self) -> GpuProvider:
        return await open_provider(self.dispatcher.config.gpus, self._scope.sim_dir, self._scope.probe_socket)

    def _on_sample(self, sample: Sampled) -> None:
        self.dispatcher.post(sample)

    def on_systemd(self, event: Event) -> None:
        """To be called with every event of `systemd`, from before `start` on."""
        match event:
            case UnitChanged(state):
                self.dispatcher.unit_changed(state)
            case Disconnected(reason):
                _log.warning("lost the connection to systemd: %s", reason)
                self.snapshot.systemd = f"disconnected: {reason}"
            case Connected():
                self.snapshot.systemd = "connected"
                self.dispatcher.spawn(self._resynchronise())

    async def _measure(self) -> None:
        try:
            await self.dispatcher.measure_all()
        except MmdError as error:
            _log.warning("cannot measure the models: %s", error)
        except Exception:  # it is tried again, for as long as the gateway lives
            _log.exception("cannot measure the models")

    async def _resynchronise(self) -> None:
        try:
            await self.dispatcher.resynchronise()
        except MmdError as error:
            _log.warning("cannot read the model units: %s", error)
        except Exception:
            _log.exception("cannot read the model units")

    async def _watch_systemd(self) -> None:
        while True:
            await asyncio.sleep(_RESYNC_S)
            await self._measure()
            await self._resynchronise()

    async def hand_over(self, command: Sequence[str], announce: Callable[[int], None]) -> bool:
        """Let a fresh gateway go on, see mmd.gateway.relief; True when this one has nothing left to do."""

        def announced(pid: int) -> None:
            announce(pid)
            self._ports.close()  # the addresses are the other's from now on, to be free when they are let go of there
            self.dispatcher.narrator.log.note(GatewayReplaced(time.time(), f"process {pid} takes over", pid))
            self._admin.end_streams()

        await self._ports.hold()
        sockets, keeper = (*self._sockets, *self._ports.sockets), self._keeper
        if await relieve(command, sockets, self.dispatcher, self._servers, self._guests, self._staff, keeper, announced):
            return True
        await self._ports.listen()
        return False

    async def stop(self) -> None:
        """Accept nothing more, finish what was accepted, leave the models running."""
        self._admin.end_streams()
        await self._ports.hold()
        for server in self._servers:
            await server.stop_accepting()
        timeout_s = self.dispatcher.config.gateway.drain_timeout_s
        if self._staff is not None:
            await self._staff.finish(timeout_s)
        await asyncio.gather(*(server.drain(timeout_s) for server in self._servers))
        with suppress(TimeoutError):  # systemd ends what is left of the unit after us, those that we have relieved as well
            async with asyncio.timeout(timeout_s):
                await self._guests.none.wait()
        self._ports.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._gauges.close()
        await self.dispatcher.close()
        await self.dispatcher.lifecycle.close()
        await self._memory.close()
        await self._systemd.close()
        self._answers.close()
        self._book.close()


def _differences(before: Config, after: Config) -> dict[str, list[str]]:
    both = before.models.keys() & after.models.keys()
    return {
        "changed": sorted(name for name in both if before.models[name] != after.models[name]),
        "added": sorted(after.models.keys() - before.models.keys()),
        "removed": sorted(before.models.keys() - after.models.keys()),
    }


def _definitions(config: Config) -> dict[str, str]:
    """The fingerprint that every model would be started with now, as the generator computes it."""
    units = (model for model in config.models.values() if model.engine is not EngineKind.EXTERNAL)
    return {model.name: definition(model, gpus=config.gpus) for model in units}
