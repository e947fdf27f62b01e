"""Tells the event log what happens: what the scheduler decided and why, what came of it, what has changed since the last look.

What is done to units is told as it happens. The rest (states that follow from others' claims, queues, memory in use) is looked
at a moment after something did, so that a thousand requests that come at once are one event.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from mmd.config import Model
from mmd.events import ActionBegun, ActionEnded, Evicted, GpusMeasured, ModelChanged, QueueChanged
from mmd.gateway.event_log import EventLog
from mmd.gateway.outcome import Outcome
from mmd.gateway.stage import model_state
from mmd.names import UnitName
from mmd.policy.actions import Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import Done, Event, Observed
from mmd.policy.instance import Instance
from mmd.policy.state import State
from mmd.quantity import human_size
from mmd.status import ModelState

__all__ = ["Narrator"]

_LOOK_S: Final = 0.5
_MEASURE_S: Final = 1.0

# Less than this is what a driver's books do by themselves.
_SMALL_BYTES: Final = 64 << 20


class Narrator:
    def __init__(self, state: State) -> None:
        self.log = EventLog()
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._states: dict[str, ModelState] = {}
        """By model name, as told last."""
        self._waiting: Mapping[str, int] = {}
        self._used: Mapping[str, int | None] = {}
        self._problem = ""
        self._measured = 0.0
        self._looking: asyncio.TimerHandle | None = None

    def heard(self, event: Event) -> None:
        """The scheduler was told something."""
        if isinstance(event, Observed):
            self._look_at(event.unit)
        elif isinstance(event, Done):
            self._look_at(event.observed.unit)
        if self._looking is None:
            self._looking = self._loop.call_later(_LOOK_S, self._look)

    def begun(self, action: UnitAction) -> None:
        now, unit, name = time.time(), action.unit, self._name(action.unit)
        verb, why = _VERBS[type(action)], self._why(action)
        level = action.level if isinstance(action, Sleep | Wake) else 0
        claim = next((each for each in self._state.claims.values() if unit in each.victims), None)
        if claim is not None and isinstance(action, Sleep | Stop):
            message = f"{name} makes room for {claim.model}"
            self.log.note(Evicted(now, message, name, str(unit), claim.model, level))
        self.log.note(ActionBegun(now, f"{name}: {verb} of {unit}: {why}", name, str(unit), verb, why, level))
        self._look_at(unit)

    def ended(self, outcome: Outcome) -> None:
        done = outcome.done
        unit, name = done.action.unit, self._name(done.action.unit)
        freed = done.freed_bytes if isinstance(done.action, Sleep | Stop) else None
        told = (str(unit), _VERBS[type(done.action)], done.ok, done.elapsed_s, done.held_bytes, freed)
        self.log.note(ActionEnded(time.time(), f"{name}: {outcome}", name, *told))

    def _why(self, action: UnitAction) -> str:
        """In words; to be asked while what led to the action is still known."""
        state = self._state
        model, instance = state.model_of(action.unit), state.instances.get(action.unit)
        if isinstance(action, Start | Wake):
            queue = state.queues.get(model.name, ()) if model is not None else ()
            if any(waiter.operator for waiter in queue):
                return "asked for by an operator"
            if queue:
                return f"requests wait for it ({len(queue)})"
            return "it is tried" if model is not None and model.name in state.trials else "it is to stand by"
        claim = next((each for each in state.claims.values() if action.unit in each.victims), None)
        if claim is not None:
            return f"it makes room for {claim.model}"
        return "it is no longer configured" if model is None else _why_it_leaves(instance)

    def _name(self, unit: UnitName) -> str:
        model = self._state.model_of(unit)
        return unit.id if model is None else model.name

    def _look_at(self, unit: UnitName) -> None:
        model = self._state.model_of(unit)
        if model is not None:
            self._tell_state(model)

    def _tell_state(self, model: Model) -> None:
        now, before = model_state(self._state, model), self._states.get(model.name)
        if now is before:
            return
        self._states[model.name] = now
        if before is not None:
            message = f"{model.name} is {now}, was {before}"
            self.log.note(ModelChanged(time.time(), message, model.name, before, now))

    def look(self) -> None:
        """Tell all that has changed."""
        models = self._state.config.models
        for name in self._states.keys() - models.keys():
            del self._states[name]
        for model in models.values():
            self._tell_state(model)
        waiting = {name: len(queue) for name, queue in self._state.queues.items()}
        if waiting != self._waiting:
            self._waiting = waiting
            words = ", ".join(f"{count} for {name}" for name, count in waiting.items())
            self.log.note(QueueChanged(time.time(), f"waiting: {words}" if words else "nobody waits", waiting))
        if self._loop.time() >= self._measured + _MEASURE_S:
            self._tell_gpus()

    def _look(self) -> None:
        self._looking = None
        self.look()

    def _tell_gpus(self) -> None:
        state = self._state
        used = {str(index): gpu.used_bytes for index, gpu in sorted(state.gpus.items())}
        if state.gpu_problem == self._problem and not _differ(used, self._used):
            return
        self._used, self._problem, self._measured = used, state.gpu_problem, self._loop.time()
        sizes = ", ".join(f"GPU {gpu}: {'?' if size is None else human_size(size)}" for gpu, size in used.items())
        message = f"GPUs cannot be read: {self._problem}" if self._problem else f"in use: {sizes}"
        self.log.note(GpusMeasured(time.time(), message, used, self._problem))

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()


_VERBS: Final[Mapping[type[UnitAction], str]] = {Start: "start", Wake: "wake", Sleep: "sleep", Stop: "stop"}


def _why_it_leaves(instance: Instance | None) -> str:
    if instance is None:
        return "it has gone"
    if instance.release is not None:
        return instance.release.why
    return "its definition has changed" if instance.stale_since is not None else "it is idle"


def _differ(now: Mapping[str, int | None], before: Mapping[str, int | None]) -> bool:
    if now.keys() != before.keys():
        return True
    pairs = [(size, before[gpu]) for gpu, size in now.items()]
    return any(
        (a is None) is not (b is None) or (a is not None and b is not None and abs(a - b) >= _SMALL_BYTES) for a, b in pairs
    )
