"""What an operator may do to a model: start, wake, verify, stop, sleep, restart, reset, pin, unpin. Each tells how it goes.

Starting goes through the same queue as every request; stopping and sleeping wait for requests in flight unless forced.
"""

import time
from collections.abc import AsyncIterator, Mapping, Sequence

from mmd.config import Model
from mmd.engines import engine
from mmd.gateway.api_error import ApiError
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.outcome import Outcome, held_bytes
from mmd.gateway.pin_book import PinBook
from mmd.gateway.snapshot import Snapshot
from mmd.gateway.stage import instance_state, model_state
from mmd.names import UnitName
from mmd.policy.actions import Sleep, Start, Stop, Wake
from mmd.policy.admission import lacking
from mmd.policy.events import Phase, Pinned, Release, Reset, Verify
from mmd.policy.instance import Instance
from mmd.policy.state import State
from mmd.policy.trial import verified
from mmd.quantity import human_duration
from mmd.status import ModelState, Progress

__all__ = ["Operations"]

# How often progress is looked at besides on every change of a unit.
_GLANCE_S = 0.5

# A trial that has not begun by then waits for memory, which may take hours: nobody watches that.
_TRIAL_BEGINS_S = 3.0

Options = Mapping[str, object]


class Operations:
    def __init__(self, dispatcher: Dispatcher, snapshot: Snapshot, pins: PinBook) -> None:
        self._dispatcher = dispatcher
        self._snapshot = snapshot
        self._pins = pins

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
                while (unit := await ticket.admitted(_GLANCE_S)) is None:
                    words = self.words(model)
                    if words != said:
                        said = words
                        yield self._progress(model, words)
            except ApiError as error:
                yield Progress(model.name, ModelState.FAILED, error.message, done=True, ok=False, tail=error.tail)
                return
        outcome = self._dispatcher.outcomes.get(unit)
        activated = outcome is not None and isinstance(outcome.done.action, Start | Wake)
        verb = "awake" if before is ModelState.SLEEPING else "ready"
        elapsed = human_duration(time.monotonic() - begun)  # with what had to leave first
        yield self._end(model, f"{verb} in {elapsed}{outcome.sizes if outcome and activated else ''}")

    async def verify(self, model: Model, _: Options) -> AsyncIterator[Progress]:
        """Try a definition by starting it in free memory; when there is none, say so and leave that to the scheduler."""
        if verified(self._state, model):
            yield self._end(model, "is verified already")
            return
        self._dispatcher.post(Verify(model.name))
        begun, said = time.monotonic(), ""
        while not verified(self._state, model):
            failures = self._state.failures.get(model.name)
            if model.name not in self._state.trials:
                why = failures.reason if failures else "its trial was given up"
                tail = failures.tail if failures else ()
                yield Progress(model.name, model_state(self._state, model), why, done=True, ok=False, tail=tail)
                return
            coming = model.name in self._state.claims or any(i.changing for i in self._state.instances_of(model))
            if not coming and time.monotonic() - begun > _TRIAL_BEGINS_S:
                yield self._end(
                    model, "there is no free memory to try it in; it is tried when there is, or by the first request"
                )
                return
            words = self.words(model)
            if words != said:
                said = words
                yield self._progress(model, words)
            await self._dispatcher.next_change(_GLANCE_S)
            if self._dispatcher.retired:
                yield self._end(model, "the gateway has been replaced meanwhile: ask again", ok=False)
                return
        sizes = [
            self._dispatcher.outcomes[i.unit].sizes
            for i in self._state.instances_of(model)
            if i.unit in self._dispatcher.outcomes
        ]
        yield self._end(model, f"verified: ready in {human_duration(time.monotonic() - begun)}{next(iter(sizes), '')}")

    def words(self, model: Model) -> str:
        """What a model that is to come up is waiting for."""
        for instance in self._state.instances_of(model):
            if instance.activating:
                return self._snapshot.status_text(instance.unit) or str(instance_state(instance))
        claim = self._state.claims.get(model.name)
        asleep = [i for i in self._state.instances_of(model) if i.phase is Phase.SLEEPING]
        if claim is None and any(time.monotonic() < i.since + model.idle.min_sleep_s for i in asleep):
            return f"asleep for at least {human_duration(model.idle.min_sleep_s)} (idle.min_sleep)"
        if claim is None and (short := lacking(self._state, model)):
            return f"waiting: {short}"
        if claim is None:
            return "waiting for memory: the models that could make room are busy or have only just come"
        victims = [str(unit.id) for unit in claim.victims]
        return f"making room: {', '.join(victims)} must leave" if victims else "waiting for another model on the same GPU"

    async def stop(self, model: Model, options: Options) -> AsyncIterator[Progress]:
        async for progress in self._release(model, self._running(model), 0, bool(options.get("force"))):
            yield progress

    def _running(self, model: Model) -> list[Instance]:
        return [i for i in self._state.instances_of(model) if i.phase not in (Phase.STOPPED, Phase.FAILED)]

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
        async for progress in self._release(model, awake, level, bool(options.get("force"))):
            yield progress

    async def _release(self, model: Model, going: Sequence[Instance], level: int, force: bool) -> AsyncIterator[Progress]:
        """Let instances of a model go down to `level` (0: stop) and say what became of them."""
        units = [instance.unit for instance in going]
        for instance in going:
            self._dispatcher.outcomes.pop(instance.unit, None)
            self._dispatcher.post(Release(instance.unit, level, force))
        if not going:
            yield self._end(model, "is stopped already")
            return
        said = ""
        refused: dict[UnitName, Outcome] = {}
        while left := [unit for unit in units if not self._gone(unit)]:
            for unit in left:
                outcome = self._dispatcher.outcomes.get(unit)
                if outcome is not None and isinstance(outcome.done.action, Sleep):
                    refused[unit] = outcome  # it is being stopped
            words = self._leaving_words(self._state.instances.get(left[0]))
            if words != said:
                said = words
                yield self._progress(model, words)
            await self._dispatcher.next_change(_GLANCE_S)
            if self._dispatcher.retired:
                yield self._end(
                    model, "the gateway has been replaced meanwhile; mmdctl status tells what became of it", ok=False
                )
                return
        yield self._farewell(model, units, level, refused)

    def _gone(self, unit: UnitName) -> bool:
        """Whether what was asked for has come to its end, good or bad."""
        outcome = self._dispatcher.outcomes.get(unit)
        if outcome is not None and (isinstance(outcome.done.action, Stop) or _slept(outcome)):
            return True
        instance = self._state.instances.get(unit)
        if instance is None or instance.phase is Phase.FAILED:
            return True
        return instance.release is None and instance.pending is None and instance.phase is Phase.SLEEPING

    def _leaving_words(self, instance: Instance | None) -> str:
        if instance is not None and instance.pending is None and instance.load:
            return f"waiting for {instance.load} requests to finish"
        return "stopping" if instance is None or instance.release is None or instance.release.level == 0 else "going to sleep"

    def _farewell(self, model: Model, units: Sequence[UnitName], level: int, refused: Mapping[UnitName, Outcome]) -> Progress:
        outcomes = [self._dispatcher.outcomes.get(unit) for unit in units]
        told = [self._parting(unit, outcome, level, refused.get(unit)) for unit, outcome in zip(units, outcomes, strict=True)]
        ok = all(self._as_asked(unit, outcome, level) for unit, outcome in zip(units, outcomes, strict=True))
        if len(units) > 1:
            told = [f"@{unit.placement}: {each}" for unit, each in zip(units, told, strict=True)]
        freed = (outcome.done.freed_bytes for outcome in outcomes if outcome is not None)
        return self._end(model, "; ".join(told), ok=ok, freed=max((each for each in freed if each is not None), default=None))

    def _as_asked(self, unit: UnitName, outcome: Outcome | None, level: int) -> bool:
        if level:
            return unit in self._state.instances and self._state.instances[unit].level > 0
        return unit not in self._state.instances if outcome is None else outcome.done.ok

    def _parting(self, unit: UnitName, outcome: Outcome | None, level: int, refused: Outcome | None) -> str:
        """What became of one instance; `refused` is the sleep that failed before."""
        if outcome is None:  # it ended before anything could be done to it
            instance = self._state.instances.get(unit)
            return "has stopped" if instance is None else f"is {instance_state(instance)}: {instance.reason}"
        match outcome.done.action:
            case Stop() if level and outcome.done.ok:
                return f"{refused or 'there is no host memory for its sleep'}; {outcome} instead"
            case Sleep(level=deeper) if deeper != level:
                return f"{outcome} (at level {deeper}, for want of host memory)"
        return str(outcome)

    async def restart(self, model: Model, options: Options) -> AsyncIterator[Progress]:
        running = self._running(model)
        if running:
            async for progress in self._release(model, running, 0, bool(options.get("force"))):
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

    async def pin(self, model: Model, _: Options) -> AsyncIterator[Progress]:
        self._pin(model, pinned=True)
        yield self._end(model, "is pinned: it makes room for no other model")

    def _pin(self, model: Model, *, pinned: bool) -> None:
        self._pins.note(model.name, pinned=pinned)
        self._dispatcher.post(Pinned(model.name, pinned))

    async def unpin(self, model: Model, _: Options) -> AsyncIterator[Progress]:
        self._pin(model, pinned=False)
        yield self._end(model, "is not pinned: it may make room for other models")


def _slept(outcome: Outcome) -> bool:
    return isinstance(outcome.done.action, Sleep) and outcome.done.ok
