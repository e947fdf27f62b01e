"""The scheduler's actions carried out: start, stop, sleep and wake of model units, each verified afterwards."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from mmd.config import EngineKind, Listen, Model
from mmd.engines import engine
from mmd.errors import MmdError
from mmd.gateway.engine_client import EngineError, EnginePool
from mmd.gateway.engine_socket import UNKNOWN_ENDPOINT, port_endpoint, socket_endpoint
from mmd.gateway.memory import Memory
from mmd.gateway.prerequisites import Why, why_not_started
from mmd.gateway.sleepers import Sleepers
from mmd.names import UnitName
from mmd.policy.actions import Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import Done, Measured, Observed, Phase
from mmd.report import FailureReason, Report
from mmd.scope import Scope
from mmd.systemd.client import Systemd
from mmd.systemd.errors import SystemdDisconnectedError, SystemdTimeoutError
from mmd.systemd.unit import ActiveState, JobResult, UnitState

__all__ = ["Lifecycle"]

_log = logging.getLogger(__name__)

# A state that we do not know counts as one in which the unit holds its memory.
_PHASES = {
    ActiveState.ACTIVE: Phase.READY,
    ActiveState.RELOADING: Phase.READY,
    ActiveState.REFRESHING: Phase.READY,
    ActiveState.UNKNOWN: Phase.STOPPING,
    ActiveState.MAINTENANCE: Phase.STOPPING,
    ActiveState.INACTIVE: Phase.STOPPED,
    ActiveState.ACTIVATING: Phase.STARTING,
    ActiveState.DEACTIVATING: Phase.STOPPING,
    ActiveState.FAILED: Phase.FAILED,
}


# systemd.exec(5), Process Exit Codes: 217/USER.
_EXIT_USER = 217

# Between two attempts to read a unit while systemd is out of reach.
_REREAD_S = 1.0

# How long systemd may take to read the unit of a model that was just added: the next reload is under way then.
_LOADED_WITHIN_S = 15.0
_LOADED_GLANCE_S = 0.2


@dataclass(frozen=True, slots=True)
class _Known:
    """An engine whose sleep state has been established for this run of its unit."""

    invocation: str
    level: int


@dataclass(frozen=True, slots=True)
class _Account:
    """GPU memory measured around an action, per GPU, where it is most; None where nothing can measure it."""

    held_bytes: int | None = None
    freed_bytes: int | None = None


class Lifecycle:
    """Drives model units. `model_of` tells the configured model of a unit, if there still is one."""

    def __init__(
        self, scope: Scope, systemd: Systemd, memory: Memory, state_file: Path, model_of: Callable[[UnitName], Model | None]
    ) -> None:
        self._scope = scope
        self._systemd = systemd
        self._memory = memory
        self._state_file = state_file
        self._sleepers = Sleepers(state_file)
        self._model_of = model_of
        self._known: dict[UnitName, _Known] = {}
        self._reports: dict[UnitName, Report] = {}
        self.engines = EnginePool()
        self.units: dict[UnitName, UnitState] = {}
        """The last state read of every unit."""

    def endpoint(self, unit: UnitName) -> str | None:
        """Where the engine of a ready unit listens, see mmd.gateway.engine_socket; None while its runner has not reported."""
        try:
            report = self._report(unit)
        except OSError:  # of our own, see Report.read: no sign that there is no engine
            return UNKNOWN_ENDPOINT
        return report.endpoint if report is not None else None

    async def perform(self, action: UnitAction) -> Done:
        """Carry out one action. Failures are part of the answer; nothing but a cancellation is raised."""
        begun = time.monotonic()
        reason, account, interrupted = "", _Account(), False
        why: Why | None = None
        self._memory.changed()
        try:
            match action:
                case Start(unit):
                    result = await self._start(unit)
                    reason = "" if result == "done" else f"its start job ended as {result}"
                    if result is JobResult.DEPENDENCY:
                        since = time.time() - (time.monotonic() - begun)
                        why = why_not_started(self._scope, self._model_of(unit), since)
                case Stop(unit):
                    reason, account = await self._stop(unit)
                case Sleep(unit, level, expected):
                    account = await self._sleep(unit, level, expected)
                case Wake(unit, level):
                    await self._wake(unit, level)
        except MmdError as error:
            reason, interrupted = str(error), isinstance(error, SystemdDisconnectedError | SystemdTimeoutError)
        except Exception:
            reason = "an internal error: journalctl -u mmd-gateway"
            _log.exception("%s of %s failed", type(action).__name__.lower(), action.unit)
        seen = await self._observe_again(action.unit, reason)
        if why is not None and seen.phase is Phase.STOPPED:  # for systemd it never began
            seen = replace(seen, phase=Phase.FAILED, reason=why.reason, tail=why.tail)
        wanted = {Start: Phase.READY, Wake: Phase.READY, Sleep: Phase.SLEEPING, Stop: Phase.STOPPED}[type(action)]
        ok = not reason and seen.phase is wanted
        try:
            if action.unit.placement.gpus and await self._memory.sample() and ok and isinstance(action, Start | Wake):
                account = _Account(self._held(action.unit, await self._processes(action.unit)))
        except Exception:  # a figure is missing; the result is not
            _log.exception("cannot measure %s", action.unit)
        self._memory.changed()
        return Done(action, seen, ok, time.monotonic() - begun, account.held_bytes, account.freed_bytes, interrupted)

    async def _observe_again(self, unit: UnitName, reason: str) -> Observed:
        """Read the unit after an action; while systemd is out of reach, keep trying: nothing may be decided on a guess."""
        while True:
            try:
                seen = await self.observe(await self._systemd.read(str(unit)))
                return seen if seen.reason or not reason else replace(seen, reason=reason)
            except MmdError as error:
                _log.warning("cannot read %s: %s", unit, error)
            except Exception:
                _log.exception("cannot read %s", unit)
            await asyncio.sleep(_REREAD_S)

    async def observe(self, state: UnitState) -> Observed:
        """What a unit is doing, from systemd's state, the runner's report and, where in doubt, the engine itself.

        Whatever goes wrong with the latter two, systemd's state counts: a model must not stay in a state that it has left."""
        try:
            return await self._observe(state)
        except Exception:
            _log.exception("cannot tell more of %s than systemd says", state.unit)
        unit = UnitName.parse(state.unit)
        assert unit is not None, state.unit
        level = self._sleepers.noted(unit, state.invocation_id)
        asleep = level > 0 and _PHASES[state.active_state] is Phase.READY
        return Observed(unit, Phase.SLEEPING if asleep else _PHASES[state.active_state], level if asleep else 0)

    async def _observe(self, state: UnitState) -> Observed:
        unit = UnitName.parse(state.unit)
        assert unit is not None, state.unit
        self.units[unit] = state
        phase = _PHASES[state.active_state]
        report = self._report(unit)
        definition = report.definition if report else ""
        if phase is Phase.FAILED:
            self._reports.pop(unit, None)
            return self._failed(unit, state, self._report(unit))
        if phase is not Phase.READY:
            self._known.pop(unit, None)
            return Observed(unit, phase, definition=definition, age_s=_age_s(state.since))
        level = await self._level(unit, state, report)
        start_s = report.load_s + report.warm_up_s if report is not None and report.ready else None
        if level == 0:
            return Observed(unit, Phase.READY, definition=definition, age_s=_age_s(state.since), start_s=start_s)
        asleep_since = self._sleepers.since(unit, state.invocation_id)
        return Observed(unit, Phase.SLEEPING, level, definition, age_s=_age_s(asleep_since), start_s=start_s)

    def _report(self, unit: UnitName) -> Report | None:
        """The report of the unit's present run; once it says `ready` it is not read again for every request."""
        state, known = self.units.get(unit), self._reports.get(unit)
        invocation = state.invocation_id if state is not None else ""
        if known is not None and known.invocation == invocation:
            return known
        report = Report.read(self._scope.unit_dir(unit))
        if report is None or report.invocation != invocation:
            return None
        report = replace(report, endpoint=self._endpoint(unit, report))
        if report.ready:
            self._reports[unit] = report
        return report

    def _endpoint(self, unit: UnitName, report: Report) -> str:
        """By the configuration. Only a port that was chosen at run time is the report's to tell: an engine can write that."""
        directory, model = self._scope.unit_dir(unit), self._model_of(unit)
        port = report.port
        if model is not None and model.engine is not EngineKind.COMMAND:
            port = None if engine(model.engine).uses_socket else port
        elif model is not None:
            port = (model.listen_port or port) if model.listen is Listen.TCP else None
        return socket_endpoint(directory) if port is None else port_endpoint(port, directory)

    def _failed(self, unit: UnitName, state: UnitState, report: Report | None) -> Observed:
        self._known.pop(unit, None)
        failed = Observed(unit, Phase.FAILED, age_s=_age_s(state.since))
        if report is not None and report.failure is not None:
            return replace(
                failed,
                definition=report.definition,
                reason=report.message,
                tail=report.tail,
                out_of_memory=report.failure is FailureReason.OUT_OF_MEMORY,
            )
        journal = f"journalctl -u {unit}"
        if state.result == "exit-code" and state.exit_status == _EXIT_USER:
            return replace(failed, reason=f"the user that it runs as does not exist: {journal}")
        words = {
            "exit-code": f"its runner never came to run or ended with status {state.exit_status}: {journal}",
            "signal": f"its runner was killed by signal {state.exit_status}",
            "watchdog": "it stopped answering its watchdog",
            "timeout": "it did not become ready in time",
            "oom-kill": "the kernel killed it for want of host memory",
        }
        return replace(failed, reason=words.get(state.result, f"its unit failed ({state.result})"))

    async def _level(self, unit: UnitName, state: UnitState, report: Report | None) -> int:
        """The sleep level of a running engine, 0 when it is awake; the engine is asked once per run of its unit."""
        known = self._known.get(unit)
        if known is not None and known.invocation == state.invocation_id:
            return known.level
        model = self._model_of(unit)
        call = engine(model.engine).sleeping if model is not None else None
        asleep = False
        if call is not None and report is not None:
            try:
                asleep = bool((await self.engines.client(report.endpoint).call(call)).get("is_sleeping"))
            except EngineError as error:
                # One that does not answer is its watchdog's to end. Until then our own note counts, and it is asked again.
                _log.warning("cannot tell whether %s sleeps: %s", unit, error)
                return self._sleepers.noted(unit, state.invocation_id)
        level = self._sleepers.level(unit, state.invocation_id) if asleep else 0
        self._known[unit] = _Known(state.invocation_id, level)
        return level

    def _know(self, unit: UnitName, level: int) -> None:
        state = self.units.get(unit)
        if state is not None:
            self._known[unit] = _Known(state.invocation_id, level)
            self._sleepers.note(unit, state.invocation_id, level)

    def inherit(self, levels: Mapping[UnitName, int]) -> None:
        """Believe the gateway before us which engines sleep, and how deep: since we looked that may have changed unseen."""
        self._sleepers = Sleepers(self._state_file)
        for unit, level in levels.items():
            state = self.units.get(unit)
            if state is not None:
                self._known[unit] = _Known(state.invocation_id, level)

    async def _start(self, unit: UnitName) -> JobResult:
        """Start a unit: how its job ended. A failed unit is reset first, or its start limit refuses."""
        state = await self._loaded(unit)
        if state.active_state is ActiveState.FAILED:
            await self._systemd.reset_failed(str(unit))
        return await self._systemd.start(str(unit))

    async def _loaded(self, unit: UnitName) -> UnitState:
        """A unit's state. One that systemd does not know may come: a model that was added while the configuration was read
        again is known here by the files, and to systemd by the reload that follows."""
        deadline_s = time.monotonic() + _LOADED_WITHIN_S
        while True:
            state = await self._systemd.read(str(unit))
            if state.load_state != "not-found" or time.monotonic() > deadline_s:
                return state
            await asyncio.sleep(_LOADED_GLANCE_S)

    async def _stop(self, unit: UnitName) -> tuple[str, _Account]:
        """Stop a unit and wait for its memory to come back. One that had to be killed ends as failed: that is cleared."""
        endpoint = self.endpoint(unit)
        before, held = self._memory.used(unit.placement), self._held(unit, await self._processes(unit))
        result = await self._systemd.stop(str(unit))
        state = await self._systemd.read(str(unit))
        if state.active_state is ActiveState.FAILED:
            await self._systemd.reset_failed(str(unit))
        self._know(unit, 0)
        self._known.pop(unit, None)
        if endpoint is not None:
            await self.engines.forget(endpoint)
        await self._memory.settle(unit.placement, before)
        after = self._memory.used(unit.placement)
        if held is None and before is not None and after is not None:
            held = max(0, before - after) // len(unit.placement.gpus)
        return "" if result == "done" else f"its stop job ended as {result}", _Account(freed_bytes=held)

    async def _sleep(self, unit: UnitName, level: int, expected_bytes: int) -> _Account:
        """Put an idle engine to sleep and verify that its memory came back: a 200 alone proves nothing (engines.md, rule 5).

        Its own processes are what counts. Where nobody can tell them apart, it is what came free on its GPUs, taken from what
        it is reckoned with. EngineError when the call failed, or when less than half of what should have come free did: the
        caller stops it instead.
        """
        model, endpoint = self._model_of(unit), self.endpoint(unit)
        if model is None or endpoint is None:
            raise EngineError(f"{unit} has no engine to put to sleep")
        before, processes = await self._memory.measure(unit.placement), await self._processes(unit)
        own = self._held(unit, processes)
        awake = self._memory.awake_bytes(model) if own is None else own
        self._know(unit, level)  # before the call: if we die during it, the unit may be asleep at this level
        for call in engine(model.engine).sleep(level):
            await self.engines.client(endpoint).call(call)
        freed = None if before is None else await self._memory.wait_freed(unit.placement, before, awake - expected_bytes)
        if freed is None:
            return _Account()
        if own is not None:
            freed = own - (self._held(unit, processes) or 0)
        if freed < (awake - expected_bytes) / 2:
            raise EngineError(f"{unit} says that it sleeps, but freed {freed >> 20} MiB of {awake >> 20} MiB")
        return _Account(max(0, awake - freed), freed)

    async def _wake(self, unit: UnitName, level: int) -> None:
        model, endpoint = self._model_of(unit), self.endpoint(unit)
        if model is None or endpoint is None:
            raise EngineError(f"{unit} has no engine to wake")
        for call in engine(model.engine).wake(level):
            await self.engines.client(endpoint).call(call)
        self._know(unit, 0)

    async def measure(self, unit: UnitName) -> Measured | None:
        """The GPU memory that the unit's processes hold, on the GPU where they hold most; None where nobody can tell."""
        held = self._held(unit, set(await self._systemd.processes(str(unit))))
        return None if held is None else Measured(unit, held)

    async def _processes(self, unit: UnitName) -> Set[int]:
        """The unit's processes; none when systemd cannot be asked, since no action depends on them."""
        if not unit.placement.gpus:
            return frozenset()
        try:
            return set(await self._systemd.processes(str(unit)))
        except MmdError as error:
            _log.warning("cannot measure %s: %s", unit, error)
            return frozenset()

    def _held(self, unit: UnitName, processes: Set[int]) -> int | None:
        """What these processes of the unit held per GPU in the last sample, where it is most; None where nobody can tell."""
        return self._memory.held_by(processes, unit.placement) or None

    async def close(self) -> None:
        await self.engines.close()


def _age_s(since: float | None) -> float:
    """Seconds since a time in Unix seconds; 0 when that is not known (0 or None) or lies in the future: the clock was set."""
    return max(0.0, time.time() - since) if since else 0.0
