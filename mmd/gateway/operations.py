"""What an operator may do to a model: start, wake, stop, sleep, restart, reset. Each tells how it goes, as `Progress`.

Starting goes through the same queue as every request; stopping and sleeping wait for requests in flight unless forced.
"""

import time
from collections.abc import AsyncIterator, Mapping

from mmd.config import Model
from mmd.engines import engine
from mmd.gateway.api_error import ApiError
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.snapshot import Snapshot, held_bytes, instance_state, model_state
from mmd.names import UnitName
from mmd.policy.actions import Sleep, Stop
from mmd.policy.events import Done, Phase, Release, Reset
from mmd.policy.instance import Instance
from mmd.policy.state import State
from mmd.quantity import human_duration, human_size
from mmd.sizes import vram_bytes
from mmd.status import ModelState, Progress

__all__ = ["Operations"]

# How often progress is looked at besides on every change of a unit.
_GLANCE_S = 0.5

Options = Mapping[str, object]


class Operations:
    def __init__(self, dispatcher: Dispatcher, snapshot: Snapshot) -> None:
        self._dispatcher = dispatcher
        self._snapshot = snapshot

    @property
    def _state(self) -> State:
        return self._dispatcher.scheduler.state

    def _progress(self, model: Model, message: str = "") -> Progress:
        return Progress(model.name, model_state(self._state, model), message)

    def _end(self, model: Model, message: str, *, ok: bool = True, freed: int | None = None) -> Progress:
        held = max((held_bytes(instance) for instance in self._state.instances_of(model)), default=0)
        state = model_state(self._state, model)
        return Progress(model.name, state, message, done=True, ok=ok, vram_bytes=held, freed_bytes=freed)

    async def start(self, model: Model, _: Options) -> AsyncIterator[Progress]:
        """Start or wake, whichever it takes, through the same queue as every request."""
        before = model_state(self._state, model)
        if before is ModelState.READY:
            yield self._end(model, "is ready already")
            return
        begun = time.monotonic()
        with self._dispatcher.request(model, operator=True) as ticket:
            said = ""
            try:
                while await ticket.admitted(_GLANCE_S) is None:
                    words = self._words(model)
                    if words != said:
                        said = words
                        yield self._progress(model, words)
            except ApiError as error:
                yield Progress(model.name, ModelState.FAILED, error.message, done=True, ok=False, tail=error.tail)
                return
        verb = "awake" if before is ModelState.SLEEPING else "ready"
        elapsed = human_duration(time.monotonic() - begun)
        size = f", {human_size(vram_bytes(model))}" if vram_bytes(model) else ""
        yield self._end(model, f"{verb} in {elapsed}{size}")

    def _words(self, model: Model) -> str:
        """What a model that is to come up is waiting for."""
        for instance in self._state.instances_of(model):
            if instance.activating:
                return self._snapshot.status_text(instance.unit) or str(instance_state(instance))
        claim = self._state.claims.get(model.name)
        if claim is None:
            return "waiting for memory: the models that could make room are busy or have only just come"
        victims = [str(unit.id) for unit in claim.victims]
        return f"making room: {', '.join(victims)} must leave" if victims else "waiting for another model on the same GPU"

    async def stop(self, model: Model, options: Options) -> AsyncIterator[Progress]:
        async for progress in self._release(model, 0, bool(options.get("force"))):
            yield progress

    async def sleep(self, model: Model, options: Options) -> AsyncIterator[Progress]:
        level = options.get("level", model.sleep_level or 1)
        assert isinstance(level, int)
        if not engine(model.engine).can_sleep:
            raise ApiError(
                409, f"{model.name}: engine {model.engine} cannot sleep; mmdctl stop frees its memory", code="cannot_sleep"
            )
        awake = [i for i in self._state.instances_of(model) if i.phase is Phase.READY]
        if not awake:
            state = model_state(self._state, model)
            ok = state in (ModelState.SLEEPING, ModelState.STOPPED)
            yield self._end(model, f"is {state} already" if ok else f"is {state}: nothing to put to sleep", ok=ok)
            return
        async for progress in self._release(model, level, bool(options.get("force"))):
            yield progress

    async def _release(self, model: Model, level: int, force: bool) -> AsyncIterator[Progress]:
        """Let every instance of a model go down to `level` (0: stop) and say what became of it."""
        going = [i for i in self._state.instances_of(model) if i.phase not in (Phase.STOPPED, Phase.FAILED)]
        before = {instance.unit: held_bytes(instance) for instance in going}
        begun = time.monotonic()
        for instance in going:
            self._dispatcher.outcomes.pop(instance.unit, None)
            self._dispatcher.post(Release(instance.unit, level, force))
        if not going:
            yield self._end(model, "is stopped already")
            return
        said = ""
        while left := [unit for unit in before if not self._gone(unit)]:
            words = self._leaving_words(self._state.instances.get(left[0]))
            if words != said:
                said = words
                yield self._progress(model, words)
            await self._dispatcher.next_change(_GLANCE_S)
        yield self._farewell(model, before, level, time.monotonic() - begun)

    def _gone(self, unit: UnitName) -> bool:
        """Whether what was asked for has come to its end, good or bad."""
        match self._dispatcher.outcomes.get(unit):
            case Done(action=Stop()) | Done(action=Sleep(), ok=True):
                return True
        instance = self._state.instances.get(unit)
        if instance is None or instance.phase is Phase.FAILED:
            return True
        return instance.release is None and instance.pending is None and instance.phase is Phase.SLEEPING

    def _leaving_words(self, instance: Instance | None) -> str:
        if instance is not None and instance.pending is None and instance.in_flight:
            return f"waiting for {len(instance.in_flight)} requests to finish"
        return "stopping" if instance is None or instance.release is None or instance.release.level == 0 else "going to sleep"

    def _farewell(self, model: Model, before: dict[UnitName, int], level: int, elapsed_s: float) -> Progress:
        outcomes = [outcome for unit in before if (outcome := self._dispatcher.outcomes.get(unit)) is not None]
        held = [outcome.held_bytes for outcome in outcomes if outcome.held_bytes is not None]
        after = max(held, default=0) if level else 0
        freed, elapsed = max(before.values()) - after, human_duration(elapsed_s)
        if level and all(unit in self._state.instances and self._state.instances[unit].level for unit in before):
            measured = f", freed {human_size(freed)}, {human_size(after)} still held" if held else ""
            return self._end(model, f"slept in {elapsed}{measured}", freed=freed if held else None)
        reason = next((outcome.observed.reason for outcome in outcomes if outcome.observed.reason), "")
        if all(isinstance(outcome.action, Stop) and outcome.ok for outcome in outcomes):
            words = f"stopped in {elapsed}" + (f", freed {human_size(freed)}" if freed else "")
            words = f"it could not sleep: {words} instead" if level else words
            return self._end(model, words, ok=level == 0, freed=freed)
        return self._end(model, reason or f"is {model_state(self._state, model)} after {elapsed}", ok=False)

    async def restart(self, model: Model, options: Options) -> AsyncIterator[Progress]:
        running = any(i.phase is not Phase.FAILED for i in self._state.instances_of(model))
        if running:
            async for progress in self._release(model, 0, bool(options.get("force"))):
                if progress.done and not progress.ok:
                    yield progress
                    return
                yield Progress(progress.model, progress.state, progress.message)
        async for progress in self.start(model, options):
            yield progress

    async def reset(self, model: Model, _: Options) -> AsyncIterator[Progress]:
        """Forget failures: in the scheduler and in systemd (start limits)."""
        for instance in self._state.instances_of(model):
            if instance.phase is Phase.FAILED:
                await self._dispatcher.reset_failed(instance.unit)
        self._dispatcher.post(Reset(model.name))
        yield self._end(model, "its failures are forgotten; the next request starts it")
