"""The scheduler: one event in, the actions that follow from it out.

Every event first changes what is known; then rounds of decisions run in a fixed order until nothing more is to be done, which
stays so until a new event or the passing of time.
"""

from dataclasses import replace

from mmd.config import Model
from mmd.names import UnitName
from mmd.policy import activation, admission
from mmd.policy.actions import Action, Refusal, Refuse, Sleep, Start, Wake
from mmd.policy.events import (
    Arrived,
    Cancelled,
    Done,
    Event,
    Finished,
    GpuSample,
    Measured,
    Observed,
    Phase,
    Reconfigured,
    Release,
    Reset,
    Sampled,
    Tick,
    Unreachable,
)
from mmd.policy.instance import Failures, Instance
from mmd.policy.ledger import plus
from mmd.policy.lesson import Lesson
from mmd.policy.retire import deadlines, retire
from mmd.policy.state import State

__all__ = ["Scheduler"]

# After a failure the next start may come after 2, 4, 8 s; the fourth in ten minutes is final until `mmdctl reset`. An engine
# that crashes for the first time is started again at once.
_BACK_OFF_S = 2.0
_MAX_FAILURES = 4
_FORGET_S = 600.0

# How much more is reckoned with, at least, after a start ran out of memory: about what estimates are off by.
_RAISE = 1.15

# After any other action failed (systemd out of reach, a right missing): long enough not to spin, short enough for a user.
_RETRY_S = 2.0

# An adopted model is spared its idle timers for this long: its clients may have waited for the gateway to come back.
_SPARED_S = 10.0


class Scheduler:
    """Decides which models hold the GPUs. Feed it with `handle`; call it with a Tick when `deadline` has come."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = State()

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions that `event`, at monotonic time `now` in seconds, leads to."""
        actions = self._learn(event, now)
        quiet = isinstance(event, Finished) and self.state.quiet()  # the end of most requests changes no decision
        return actions if quiet else actions + self._settle(now)

    def deadline(self, now: float) -> float | None:
        """When to come back with a Tick although nothing else happened; None: never."""
        return min((at for at in deadlines(self.state, now) if at > now), default=None)

    def _settle(self, now: float) -> list[Action]:
        """Rounds of decisions until one changes nothing: what one decides may open what an earlier step looked at."""
        actions: list[Action] = []
        claims: object = None
        while True:
            found = self._round(now)
            actions += found
            before, claims = claims, {name: (claim.unit, claim.victims) for name, claim in self.state.claims.items()}
            if not found and claims == before:
                return actions

    def _round(self, now: float) -> list[Action]:
        state = self.state
        actions = admission.expire(state, now)
        activation.revise(state)
        actions += admission.admit(state, now)
        actions += activation.make_claims(state, now)
        actions += retire(state, now)
        actions += activation.advance(state, now)
        return actions

    def _learn(self, event: Event, now: float) -> list[Action]:
        match event:
            case Arrived():
                return admission.arrive(self.state, event, now)
            case Cancelled(request):
                admission.drop(self.state, request)
            case Finished(request):
                self._finish(request, now)
            case Unreachable(request):
                return self._unreachable(request, now)
            case Observed(unit):
                return self._observe(event, now) if not self._pending(unit) else []
            case Done():
                return self._done(event, now)
            case Release():
                return self._release(event)
            case Reset(model):
                self._reset(model)
            case Measured():
                self._measure(event)
            case Sampled(gpus, problem):
                self.state.gpu_problem = problem
                if not problem:
                    self._sample(gpus)
            case Reconfigured():
                return self._reconfigure(event, now)
            case Tick():
                pass
        return []

    def _pending(self, unit: UnitName) -> bool:
        instance = self.state.instances.get(unit)
        return instance is not None and instance.pending is not None

    def _release(self, event: Release) -> list[Action]:
        """Note what an operator wants; whoever waits for a model whose loading is stopped is told so."""
        instance = self.state.instances.get(event.unit)
        if instance is None or instance.phase is Phase.FAILED or (event.level and instance.phase is Phase.SLEEPING):
            return []
        instance.release = event
        if event.level or not instance.activating or instance.model is None:
            return []
        message = f"{instance.model.name} was stopped by an operator while it was loading"
        return admission.refuse_all(self.state, instance.model.name, Refusal.STOPPED, message, retry_after_s=None)

    def _finish(self, request: int, now: float) -> None:
        unit = self.state.admitted.pop(request, None)
        instance = self.state.instances.get(unit) if unit else None
        if instance is not None:
            instance.in_flight.discard(request)
            instance.last_activity = now

    def _unreachable(self, request: int, now: float) -> list[Action]:
        """Requests never bypass the queue: the request waits again, and its silent instance is stopped first."""
        unit = self.state.admitted.get(request)
        if unit is None:
            return []
        self._finish(request, now)
        model = self.state.model_of(unit)
        if model is None:
            message = f"{unit} does not answer, and its model has been removed from the configuration"
            return [Refuse(request, Refusal.REMOVED, message)]
        admission.requeue(self.state, request, model.name, now)
        instance = self.state.instances.get(unit)
        if instance is not None and instance.phase is Phase.READY and instance.pending is None:
            instance.release = Release(unit)
        return []

    def _observe(self, seen: Observed, now: float) -> list[Action]:
        """Take over the state of a unit; answer the waiters of one that has failed."""
        instance = self.state.instances.get(seen.unit)
        unknown_failure = seen.phase is Phase.FAILED and self.state.model_of(seen.unit) is None
        if seen.phase is Phase.STOPPED or unknown_failure:
            self.state.instances.pop(seen.unit, None)
            return []
        if instance is None:
            instance = self.state.instances[seen.unit] = self._adopt(seen, now)
        was = instance.phase
        instance.observe(seen, now)
        if instance.ready_since is None and seen.phase in (Phase.READY, Phase.SLEEPING):
            instance.ready_since = now
        elif seen.phase is Phase.STARTING:
            instance.ready_since = None
        if seen.phase is Phase.FAILED:
            instance.release = None
        self._check_definition(instance, now)
        failed = seen.phase is Phase.FAILED and was is not Phase.FAILED
        return self._fail(instance, now, crashed=instance.ready_since is not None) if failed else []

    def _adopt(self, seen: Observed, now: float) -> Instance:
        """An instance that somebody else started, or that an earlier gateway left behind."""
        began = now - seen.age_s
        instance = Instance(seen.unit, self.state.model_of(seen.unit), seen.phase, began, level=seen.level)
        instance.spared_until = now + _SPARED_S
        if seen.phase in (Phase.READY, Phase.SLEEPING):
            instance.ready_since = began
        return instance

    def _done(self, event: Done, now: float) -> list[Action]:
        action, seen = event.action, event.observed
        instance = self.state.instances.get(seen.unit)
        if instance is None or instance.pending is None or instance.pending.serial != action.serial:
            return []  # overtaken by a stop: that one's Done counts
        instance.pending = None
        actions = self._observe(seen, now)
        if isinstance(action, Start) and seen.phase is Phase.STOPPED and not event.interrupted:
            instance.reason = seen.reason or "its unit did not start"
            actions += self._fail(instance, now)
        if event.ok:
            instance.release = None
            self._learn_cost(instance, event)
        elif isinstance(action, Sleep | Wake) and seen.phase in (Phase.READY, Phase.SLEEPING):
            # Half asleep: nothing but a restart makes it trustworthy again (engines.md, rule 3).
            instance.release = Release(instance.unit, force=True)
        else:
            instance.retry_at = now + _RETRY_S
        return actions

    def _learn_cost(self, instance: Instance, event: Done) -> None:
        if instance.model is None:
            return
        name = instance.model.name
        lesson = self.state.lesson_of(name)
        match event.action:
            case Start():
                instance.activation_s = event.elapsed_s
                self.state.retried.discard(name)
                lesson = replace(lesson, start_s=event.elapsed_s)
            case Wake():
                instance.activation_s = event.elapsed_s
                lesson = replace(lesson, wake_s=event.elapsed_s)
            case Sleep(level=level):
                instance.held_bytes = event.held_bytes
                if event.held_bytes is not None:
                    lesson = replace(lesson, held_bytes={**lesson.held_bytes, level: event.held_bytes})
        self.state.lessons[name] = lesson

    def _measure(self, event: Measured) -> None:
        """An awake instance that holds more than it was reckoned with is reckoned with that from now on, and ever after."""
        instance = self.state.instances.get(event.unit)
        if instance is None or instance.model is None or instance.phase is not Phase.READY or instance.pending is not None:
            return
        lesson, seen = self.state.lesson_of(instance.model.name), min(event.vram_bytes, self._most(instance))
        if seen > lesson.peak_bytes:
            self.state.lessons[instance.model.name] = replace(lesson, peak_bytes=seen)
        instance.vram_bytes = max(instance.vram_bytes, seen)

    def _most(self, instance: Instance) -> int:
        """What its largest GPU may give it: what has run once must not be reckoned with more, or it would never fit again."""
        gpus = (gpu for gpu in instance.unit.placement.gpus if gpu in self.state.gpus)
        return int(max((self.state.empty()[gpu] for gpu in gpus), default=0))

    def _fail(self, instance: Instance, now: float, *, crashed: bool = False) -> list[Action]:
        """Count a failure against its model. Whoever waits is told why, unless a crashed engine gets another chance."""
        model = self.state.model_of(instance.unit)
        if model is None:
            return []
        if instance.out_of_memory and self._raise_size(instance, model):
            return []
        before = self.state.failures.get(model.name)
        count = before.count + 1 if before and now - before.at < _FORGET_S else 1
        final = count >= _MAX_FAILURES
        retry_at = now if crashed and count == 1 else now + _BACK_OFF_S * 2 ** (count - 1)
        reason = instance.reason or "its unit failed"
        self.state.failures[model.name] = Failures(count, now, retry_at, reason, instance.tail, crashed, final)
        self.state.preload.discard(model.name)
        if crashed and not final:
            self.state.preload |= {model.name} if model.preload else set()
            return []
        retry_s = None if final else retry_at - now
        return admission.refuse_all(
            self.state,
            model.name,
            Refusal.START_FAILED,
            f"{model.name}: {reason}",
            retry_after_s=retry_s,
            tail=instance.tail,
        )

    def _raise_size(self, instance: Instance, model: Model) -> bool:
        """Reckon with more memory after a start ran out of it, and say whether to try again: once, after freeing more.

        Never with more than a GPU has: a start that fails although it has one to itself is to say why.
        """
        state = self.state
        again = model.name not in state.retried
        state.retried.add(model.name)
        raised = min(int(max(instance.vram_bytes * _RAISE, self._room(instance))), self._most(instance))
        state.lessons[model.name] = replace(state.lesson_of(model.name), raised_bytes=raised)
        return again

    def _room(self, instance: Instance) -> float:
        """What the others left of its fullest GPU: if that did not do, it needs more."""
        state = self.state
        held = plus(other.holds() for other in state.instances.values() if other is not instance)
        gpus = (state.gpus[gpu] for gpu in instance.unit.placement.gpus if gpu in state.gpus)
        rooms = (gpu.total_bytes - held.get(gpu.index, 0) - state.foreign.get(gpu.index, 0) for gpu in gpus)
        return min(rooms, default=0.0)

    def _reset(self, name: str) -> None:
        self.state.failures.pop(name, None)
        self.state.lessons.pop(name, None)
        self.state.retried.discard(name)
        model = self.state.config.models.get(name)
        for instance in self.state.instances_of(model) if model else []:
            if instance.phase is Phase.FAILED and instance.pending is None:
                del self.state.instances[instance.unit]

    def _sample(self, gpus: tuple[GpuSample, ...]) -> None:
        """Take over what was measured. Foreign use is what our instances do not account for.

        While the memory of a GPU is being changed the books are ahead of (or behind) the device, so the last value stays.
        """
        held = plus(instance.holds() for instance in self.state.instances.values())
        self.state.gpus = {gpu.index: gpu for gpu in gpus}
        changing = {gpu for i in self.state.instances.values() if i.changing for gpu in i.unit.placement.gpus}
        for gpu in gpus:
            if gpu.used_bytes is not None and gpu.index not in changing:
                self.state.foreign[gpu.index] = max(0.0, gpu.used_bytes - held.get(gpu.index, 0))

    def _reconfigure(self, event: Reconfigured, now: float) -> list[Action]:
        state, before, known = self.state, self.state.config, self.state.definitions
        state.config, state.definitions, state.host_ram_bytes = event.config, event.definitions, event.ram_bytes
        actions: list[Action] = []
        for name in [name for name in state.queues if name not in event.config.models]:
            message = f"the model {name!r} has been removed from the configuration"
            actions += admission.refuse_all(state, name, Refusal.REMOVED, message, retry_after_s=None)
        for name in {*state.failures, *state.claims}:
            if before.models.get(name) != event.config.models.get(name):
                state.failures.pop(name, None)
                state.claims.pop(name, None)
        state.lessons = {
            name: state.lessons.get(name, Lesson()) if definition == known.get(name) else event.lessons.get(name, Lesson())
            for name, definition in event.definitions.items()
        }
        new = [model for name, model in event.config.models.items() if before.models.get(name) != model]
        state.preload = {name for name in state.preload if name in event.config.models}
        state.preload |= {model.name for model in new if model.preload}
        for instance in state.instances.values():
            self._check_definition(instance, now)
        return actions

    def _check_definition(self, instance: Instance, now: float) -> None:
        """Mark an instance whose definition is no longer the configured one; it is replaced when it is next idle."""
        model = self.state.model_of(instance.unit)
        current = self.state.definitions.get(model.name, "") if model else None
        same = model is not None and (not current or not instance.definition or instance.definition == current)
        if same and model is not None:
            instance.model, instance.stale_since, instance.retiring = model, None, False
            instance.vram_bytes = instance.vram_bytes or self.state.vram_of(model)
        elif instance.stale_since is None:
            instance.stale_since = now
