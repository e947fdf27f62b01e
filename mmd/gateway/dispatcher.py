"""Between the pure scheduler and the world: feeds it events, carries out its actions, keeps its clock.

Everything runs on one event loop, so the scheduler is never entered twice. Actions run as tasks, one per unit at most (the
scheduler sees to that); each ends in a `Done`. What systemd reports is read in order, unit by unit.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from itertools import count
from typing import Any, Protocol

from mmd.config import Config, EngineKind, Model
from mmd.errors import MmdError
from mmd.gateway.api_error import ApiError, refused
from mmd.gateway.lesson_book import LessonBook
from mmd.gateway.lifecycle import Lifecycle
from mmd.gateway.narrator import Narrator
from mmd.gateway.outcome import Outcome, held_bytes
from mmd.gateway.progress import progress
from mmd.gateway.relay.engine import EngineConnections
from mmd.gateway.relay.gate import Gate
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.ticket import Ticket
from mmd.names import UnitName
from mmd.policy.actions import Action, Admit, Lend, Recall, Refuse, Sleep, Start, UnitAction, Wake
from mmd.policy.events import (
    Arrived,
    Cancelled,
    Done,
    Event,
    Finished,
    Inherited,
    Measured,
    Observed,
    Paused,
    Phase,
    Reconfigured,
    Reset,
    Staffed,
    Tick,
    Unreachable,
)
from mmd.policy.lesson import Lesson
from mmd.policy.scheduler import Scheduler
from mmd.systemd.client import Systemd
from mmd.systemd.unit import UnitState

__all__ = ["Dispatcher", "Lender"]

_PAUSE_POLL_S = 0.1

_log = logging.getLogger(__name__)

# By how much an idle timer may be late: it is seconds at least.
_ARM_S = 0.05


class Lender(Protocol):
    """Who tells the gateway's workers what the scheduler lends them, see mmd.policy.leases."""

    def lend(self, unit: UnitName) -> None: ...

    def renew(self, unit: UnitName) -> None:
        """The unit was looked at again: its engine may listen elsewhere."""

    def recall(self, unit: UnitName) -> None:
        """Answer by `Returned`, later."""

    def survey(self) -> None:
        """Tell the scheduler, by `Surveyed`, what workers have in flight."""


class Dispatcher(Gate):
    def __init__(self, lifecycle: Lifecycle, systemd: Systemd, book: LessonBook) -> None:
        self.scheduler = Scheduler()
        self.lifecycle = lifecycle
        self.narrator = Narrator(self.scheduler.state)
        self.retired = False
        """Another gateway decides."""
        self.outcomes: dict[UnitName, Outcome] = {}
        """The last finished action on each unit."""
        self._lender: Lender | None = None
        self._kept = KeptAnswers(self._runs)
        self._systemd = systemd
        self._book = book
        self._written: dict[str, Lesson] = {}
        self._loop = asyncio.get_running_loop()
        self._requests = count(1)
        self._admissions: dict[int, asyncio.Future[UnitName]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._arming = False
        self._closed = False
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self._unread: dict[UnitName, UnitState] = {}
        self._reading: set[UnitName] = set()

    @property
    def config(self) -> Config:
        return self.scheduler.state.config

    def post(self, event: Event) -> None:
        """Tell the scheduler, and do what it says."""
        now = self._loop.time()
        try:
            for action in self.scheduler.handle(event, now):
                self._try_to_perform(action)
        finally:
            self._arm(now)
        if not isinstance(event, Arrived | Finished | Cancelled):
            self._announce()
        try:
            self.narrator.heard(event)
            if isinstance(event, Done | Measured | Observed | Reset):
                self._write_lessons()
        except Exception:  # to tell of it and to write it down come after what was decided, and undo none of it
            _log.exception("cannot tell of an event")

    def request(self, model: Model, wait_s: float | None = None, *, operator: bool = False) -> Ticket:
        """Ask for an instance of `model`."""
        request = next(self._requests)
        unit = None if operator else self.scheduler.admit_at_once(request, model.name, self._loop.time())
        if unit is not None:
            self._arm_soon()
            return Ticket(self, request, model, unit=unit)
        admission: asyncio.Future[UnitName] = self._loop.create_future()
        self._admissions[request] = admission
        self.post(Arrived(request, model.name, operator, wait_s))
        return Ticket(self, request, model, admission=admission)

    def lend_to(self, lender: Lender) -> None:
        """There are workers: lend them what may be lent."""
        self._lender = lender
        self._kept.others += 1
        self.post(Staffed())

    def survey(self) -> None:
        """Bring what is in flight up to date, for somebody who looks."""
        if self._lender is not None:
            self._lender.survey()

    def lost(self, unit: UnitName, model: Model, wait_s: float | None) -> Ticket:
        """A worker's request, let in by a lease, found nobody listening at `unit`: it waits for another admission."""
        if unit not in self.scheduler.state.instances:
            return self.request(model, wait_s)
        (request,) = self.inherit(unit, 1, None)
        ticket = Ticket(self, request, model, unit=unit)
        ticket.unreachable(wait_s)
        return ticket

    def inherit(self, unit: UnitName, count: int, idle_s: float | None) -> list[int]:
        """Reckon with `count` requests that another process serves at a unit; each is over when it is given to `forgo`."""
        requests = [next(self._requests) for _ in range(count)]
        self.post(Inherited(unit, tuple(requests), idle_s))
        return requests

    def forgo(self, request: int) -> None:
        self.post(Finished(request))

    def endpoint(self, unit: UnitName) -> str | None:
        return self.lifecycle.endpoint(unit)

    def connections(self, endpoint: str) -> EngineConnections:
        return self.lifecycle.engines.connections(endpoint)

    def kept(self) -> KeptAnswers:
        return self._kept

    def _runs(self, name: str) -> bool:
        """Whether the engine of a model is there, awake or asleep."""
        model, state = self.config.models.get(name), self.scheduler.state
        if model is None or model.engine is EngineKind.EXTERNAL:
            return model is not None
        return any(instance.phase in (Phase.READY, Phase.SLEEPING) for instance in state.instances_of(model))

    def progress(self, request: int, model: Model) -> str:
        """What a request waits for."""
        return progress(self.scheduler.state, model, request, self.lifecycle.units, self._loop.time())

    async def pause(self) -> None:
        """Begin nothing more, and wait until no engine is on its way to sleep or awake: half-way nobody could take it over.

        Units that systemd is starting or stopping are no matter: whoever comes next sees them do so.
        """
        self.post(Paused(True))
        state = self.scheduler.state
        while state.lent or any(isinstance(instance.pending, Sleep | Wake) for instance in state.instances.values()):
            await self.next_change(_PAUSE_POLL_S)

    def resume(self) -> None:
        self.post(Paused(False))

    def retire(self) -> None:
        """Somebody else decides, for good: whoever still waits for a decision of ours is told so."""
        self.retired = True
        message = "the gateway has been replaced meanwhile; ask again"
        for admission in self._admissions.values():
            if not admission.done():
                admission.set_exception(ApiError(503, message, code="gateway_replaced", retry_after_s=1))
                admission.exception()  # nobody may be looking
        self._announce()

    def readmit(self, request: int, wait_s: float | None) -> "asyncio.Future[UnitName]":
        admission: asyncio.Future[UnitName] = self._loop.create_future()
        self._admissions[request] = admission
        self.post(Unreachable(request, wait_s))
        return admission

    def give_back(self, request: int, admission: "asyncio.Future[UnitName] | None") -> None:
        """End a request in whatever state it is; turned away ones have ended already. No `admission`: let in at once."""
        if admission is not None:
            self._admissions.pop(request, None)
            if not admission.done():
                admission.cancel()
                self.post(Cancelled(request))
                return
            if admission.cancelled() or admission.exception() is not None:
                return
        if self.scheduler.finish_at_once(request, self._loop.time()):
            self._arm_soon()
        else:
            self.post(Finished(request))

    def _try_to_perform(self, action: Action) -> None:
        """The scheduler reckons with every action that it has decided: one that fails must not take those behind it along."""
        try:
            self._perform(action)
        except Exception:
            _log.exception("cannot begin an action")

    def _perform(self, action: Action) -> None:
        match action:
            case Admit(request, unit):
                admission = self._admissions[request]
                if not admission.done():
                    admission.set_result(unit)
            case Refuse(request):
                admission = self._admissions[request]
                if not admission.done():
                    admission.set_exception(refused(action))
                    admission.exception()  # the client may have left: nobody need look at it
            case Lend(unit):
                assert self._lender is not None
                self._lender.lend(unit)
            case Recall(unit):
                assert self._lender is not None
                self._lender.recall(unit)
            case _:
                _log.info("%s %s", type(action).__name__.lower(), action.unit)
                self.spawn(self._act(action))
                self.narrator.begun(action)

    async def _act(self, action: UnitAction) -> None:
        """Ends with a `Done`, whatever happens: without one the unit would be starting or stopping for ever."""
        try:
            done = await self.lifecycle.perform(action)
        except Exception:
            _log.exception("%s of %s failed", type(action).__name__.lower(), action.unit)
            done = self._failed(action)
        try:
            self._tell_outcome(action, done)
        except Exception:
            _log.exception("cannot tell of the end of an action")
        self.post(done)
        if done.held_bytes is not None and isinstance(action, Start | Wake):
            self.post(Measured(action.unit, done.held_bytes))

    def _failed(self, action: UnitAction) -> Done:
        """The result of an action that broke off: as far as is known, the unit is what it was."""
        instance = self.scheduler.state.instances.get(action.unit)
        phase, level = (Phase.STOPPED, 0) if instance is None else (instance.phase, instance.level)
        reason = "an internal error: journalctl -u mmd-gateway"
        return Done(action, Observed(action.unit, phase, level, reason=reason), ok=False, interrupted=True)

    def _tell_outcome(self, action: UnitAction, done: Done) -> None:
        instance = self.scheduler.state.instances.get(action.unit)
        outcome = Outcome(done, held_bytes(instance) if instance else 0)
        overtaken = instance is None or instance.pending is not action  # by a stop, whose outcome counts
        if not overtaken:
            self.outcomes[action.unit] = outcome
            self.narrator.ended(outcome)
        _log.log(logging.INFO if done.ok or overtaken else logging.WARNING, "%s: %s", action.unit, outcome)

    async def _measure(self, unit: UnitName) -> None:
        measured = await self.lifecycle.measure(unit)
        if measured is not None:
            self.post(measured)

    async def measure_all(self) -> None:
        """Look how much memory those that are awake have come to hold."""
        awake = [i.unit for i in self.scheduler.state.resident() if i.phase is Phase.READY and i.unit.placement.gpus]
        for unit in awake:
            await self._measure(unit)

    def _write_lessons(self) -> None:
        state = self.scheduler.state
        for name, lesson in state.lessons.items():
            if lesson is not self._written.get(name):
                self._book.save(name, state.definitions[name], lesson)
        for name in self._written.keys() - state.lessons.keys():
            self._book.forget(name)
        self._written = dict(state.lessons)

    def _arm(self, now: float) -> None:
        """Come back when the passing of time alone changes something."""
        if self._timer is not None:
            self._timer.cancel()
        at = self.scheduler.deadline(now)
        self._timer = None if at is None else self._loop.call_at(at + 0.001, self.post, Tick())

    def _arm_soon(self) -> None:
        """As `_arm`, for what at most moves a distant deadline: thousands of requests a second share one look at it."""
        if not self._arming:
            self._arming = True
            self._loop.call_later(_ARM_S, self._arm_now)

    def _arm_now(self) -> None:
        self._arming = False
        if not self._closed:
            self._arm(self._loop.time())

    def unit_changed(self, state: UnitState) -> None:
        """systemd reported a change: read what it means and tell the scheduler. The latest state of a unit wins."""
        unit = UnitName.parse(state.unit)
        if unit is None:
            return
        self.lifecycle.units[unit] = state
        self._announce()
        self._unread[unit] = state
        if unit not in self._reading:
            self._reading.add(unit)
            self.spawn(self._read(unit))

    async def _read(self, unit: UnitName) -> None:
        try:
            while (state := self._unread.pop(unit, None)) is not None:
                self.post(await self.lifecycle.observe(state))
                if self._lender is not None:
                    self._lender.renew(unit)
        finally:
            self._reading.discard(unit)

    async def resynchronise(self) -> None:
        """Read every model unit from systemd, and forget those that it does not know: it is right, our memory may not be."""
        states = await self._systemd.list_models()
        for state in states:
            self.unit_changed(state)
        listed = {state.unit for state in states}
        for unit, instance in list(self.scheduler.state.instances.items()):
            if str(unit) not in listed and instance.pending is None:
                self.post(Observed(unit, Phase.STOPPED))

    async def adopt(self) -> None:
        """At start-up: take over what runs, and return when all of it has been looked at."""
        await self.resynchronise()
        while self._reading:
            await self.next_change(0.05)

    def reconfigure(self, config: Config, definitions: Mapping[str, str], ram_bytes: float) -> None:
        self.post(Reconfigured(config, definitions, ram_bytes, self._book.load(definitions)))
        self._written = dict(self.scheduler.state.lessons)

    async def reset_failed(self, unit: UnitName) -> None:
        """Clear systemd's memory of a failed unit."""
        await self._systemd.reset_failed(str(unit))

    async def next_change(self, timeout_s: float) -> None:
        """Wait until the state of some unit may have changed, or for `timeout_s`."""
        await asyncio.wait((self._changed,), timeout=timeout_s)

    def _announce(self) -> None:
        if not self._changed.done():
            self._changed.set_result(None)
        self._changed = self._loop.create_future()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that nobody waits for; it ends with the gateway."""
        task = self._loop.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """The boundary of a task: a failure is logged, and costs nobody else anything."""
        try:
            await work
        except MmdError as error:
            _log.warning("%s", error)
        except Exception:
            _log.exception("a task of the gateway failed")

    async def close(self) -> None:
        """Stop looking after units; they go on running, and the next gateway adopts them."""
        self._closed = True
        self.narrator.close()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
