"""The scheduler: one event in, the actions that follow from it out.

Every event first changes what is known; then rounds of decisions run in a fixed order until nothing more is to be done, which
stays so until a new event or the passing of time.
"""

from mmd.names import UnitName
from mmd.policy import activation, admission, learning, leases, replicas, trial
from mmd.policy.actions import Action, Admit, Refusal, Refuse, Sleep, Start, Stop, Wake
from mmd.policy.events import (
    Arrived,
    Cancelled,
    Done,
    Event,
    Finished,
    Gauged,
    Inherited,
    Measured,
    Observed,
    Paused,
    Phase,
    Pinned,
    Reconfigured,
    Release,
    Reset,
    Returned,
    Sampled,
    Staffed,
    Surveyed,
    Tick,
    Unreachable,
    Verify,
)
from mmd.policy.instance import Failures, Instance, Waiter
from mmd.policy.lesson import Lesson
from mmd.policy.retire import deadlines, retire
from mmd.policy.state import State

__all__ = ["Scheduler"]

# After a failure the next start may come after 2, 4, 8 s; the fourth in ten minutes is final until `mmdctl reset`. An engine
# that crashes for the first time is started again at once.
_BACK_OFF_S = 2.0
_MAX_FAILURES = 4
_FORGET_S = 600.0

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
        if isinstance(event, Finished) and self.finish_at_once(event.request, now):
            return []
        if isinstance(event, Arrived) and not event.operator:
            unit = self.admit_at_once(event.request, event.model, now)
            if unit is not None:
                return [Admit(event.request, unit)]
        return self._learn(event, now) + self._settle(now)

    def admit_at_once(self, request: int, model: str, now: float) -> UnitName | None:
        """Most requests find their model ready and nobody waiting: the instance for this one, which changes no other decision.

        None: nothing has changed, and the scheduler is to handle it as an `Arrived`.
        """
        return admission.admit_at_once(self.state, request, model, now)

    def finish_at_once(self, request: int, now: float) -> bool:
        """The end of most requests changes no decision either. False: nothing has changed, handle it as a `Finished`."""
        return admission.finish_at_once(self.state, request, now)

    def deadline(self, now: float) -> float | None:
        """When to come back with a Tick although nothing else happened; None: never."""
        return min((at for at in (*deadlines(self.state, now), *replicas.deadlines(self.state)) if at > now), default=None)

    def _settle(self, now: float) -> list[Action]:
        """Rounds of decisions until one changes nothing: what one decides may open what an earlier step looked at."""
        actions: list[Action] = []
        claims: object = None
        while not self.state.paused:
            found = self._round(now)
            actions += found
            before, claims = claims, {name: (claim.unit, claim.victims) for name, claim in self.state.claims.items()}
            if not found and claims == before:
                break
        return actions + leases.lend_and_recall(self.state)

    def _round(self, now: float) -> list[Action]:
        state = self.state
        actions = admission.expire(state, now)
        activation.revise(state)
        actions += admission.admit(state, now)
        replicas.watch(state, now)
        actions += activation.make_claims(state, now)
        replicas.make_claims(state, now)
        trial.make_claims(state, now)
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
                admission.finish(self.state, request, now)
            case Unreachable(request, wait_s):
                return self._unreachable(request, wait_s, now)
            case Observed(unit):
                return self._observe(event, now) if not self._pending(unit) else []
            case Done():
                return self._done(event, now)
            case Release():
                return self._release(event)
            case Reset(model):
                self._reset(model)
            case Pinned(model, pinned):
                self._pin(model, pinned)
            case Verify(model):
                trial.begin(self.state, model)
            case Paused(paused):
                self.state.paused = paused
            case Inherited():
                self._inherit(event, now)
            case Staffed():
                self.state.lending = True
            case Returned(unit):
                leases.returned(self.state, unit)
            case Surveyed():
                leases.learn_survey(self.state, event, now)
            case Measured():
                learning.learn_size(self.state, event)
            case Gauged(resource, free):
                learning.learn_gauge(self.state, resource, free)
            case Sampled(gpus, problem):
                self.state.gpu_problem, self.state.gpus_awaited = problem, False
                if not problem:
                    learning.learn_sample(self.state, gpus)
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
        self.state.trials.discard(instance.model.name)
        message = f"{instance.model.name} was stopped by an operator while it was loading"
        return admission.refuse_all(self.state, instance.model.name, Refusal.STOPPED, message, retry_after_s=None)

    def _unreachable(self, request: int, wait_s: float | None, now: float) -> list[Action]:
        """Requests never bypass the queue: the request waits again, and its silent instance is stopped first."""
        unit = self.state.admitted.get(request)
        if unit is None:
            return []
        admission.finish(self.state, request, now)
        model = self.state.model_of(unit)
        if model is None:
            message = f"{unit} does not answer, and its model has been removed from the configuration"
            return [Refuse(request, Refusal.REMOVED, message)]
        admission.requeue(self.state, Waiter(request, model.name, now, operator=False, wait_s=wait_s))
        instance = self.state.instances.get(unit)
        if instance is not None and instance.phase is Phase.READY and instance.pending is None:
            instance.release = Release(unit, why="nobody answers at its engine")
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
        learning.learn_start(self.state, instance, seen.start_s)
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

    def _pin(self, name: str, pinned: bool) -> None:
        """Note it; whoever was to have the memory of one that is pinned now looks elsewhere."""
        state = self.state
        state.pins[name] = pinned
        model = state.config.models.get(name)
        if model is None or not pinned:
            return
        for wanting, claim in list(state.claims.items()):
            if any(unit.id == model.id for unit in claim.victims):
                del state.claims[wanting]

    def _inherit(self, event: Inherited, now: float) -> None:
        instance = self.state.instances.get(event.unit)
        if instance is None:
            return
        instance.in_flight |= set(event.requests)
        self.state.admitted |= dict.fromkeys(event.requests, event.unit)
        if event.idle_s is not None:
            instance.last_activity = now - event.idle_s

    def _done(self, event: Done, now: float) -> list[Action]:
        action, seen = event.action, event.observed
        instance = self.state.instances.get(seen.unit)
        if instance is None or instance.pending is None or instance.pending.serial != action.serial:
            return []  # overtaken by a stop: that one's Done counts
        instance.pending = None
        actions = self._observe(seen, now)
        model = self.state.model_of(action.unit)
        if isinstance(action, Sleep | Stop) and instance.release is None and model is not None and model.replicas.min:
            self.state.preload.add(model.name)  # it comes back when there is room
        if isinstance(action, Start) and seen.phase is Phase.STOPPED and not event.interrupted:
            instance.reason = seen.reason or "its unit did not start"
            actions += self._fail(instance, now)
        if event.ok:
            instance.release = None
            learning.learn_outcome(self.state, instance, event)
        elif isinstance(action, Sleep | Wake) and seen.phase in (Phase.READY, Phase.SLEEPING):
            # Half asleep: nothing but a restart makes it trustworthy again (engines.md, rule 3).
            instance.release = Release(instance.unit, force=True, why="it is neither asleep nor awake")
        else:
            instance.retry_at = now + _RETRY_S
        return actions

    def _fail(self, instance: Instance, now: float, *, crashed: bool = False) -> list[Action]:
        """Count a failure against its model. Whoever waits is told why, unless a crashed engine gets another chance."""
        model = self.state.model_of(instance.unit)
        if model is None:
            return []
        if instance.out_of_memory and learning.raise_size(self.state, instance, model):
            return []
        before = self.state.failures.get(model.name)
        count = before.count + 1 if before and now - before.at < _FORGET_S else 1
        final = count >= _MAX_FAILURES
        retry_at = now if crashed and count == 1 else now + _BACK_OFF_S * 2 ** (count - 1)
        reason = instance.reason or "its unit failed"
        self.state.failures[model.name] = Failures(count, now, retry_at, reason, instance.tail, crashed, final)
        self.state.preload.discard(model.name)
        self.state.trials.discard(model.name)
        if crashed and not final:
            self.state.preload |= {model.name} if replicas.standing(model) else set()
            return []
        if model.replicas.min and not final:
            self.state.preload.add(model.name)
        if any(other.phase is Phase.READY for other in self.state.instances_of(model)):
            return []  # they serve those who wait
        retry_s = None if final else retry_at - now
        return admission.refuse_all(
            self.state,
            model.name,
            Refusal.START_FAILED,
            f"{model.name}: {reason}",
            retry_after_s=retry_s,
            tail=instance.tail,
        )

    def _reset(self, name: str) -> None:
        self.state.failures.pop(name, None)
        self.state.lessons.pop(name, None)
        self.state.retried.discard(name)
        model = self.state.config.models.get(name)
        for instance in self.state.instances_of(model) if model else []:
            if instance.phase is Phase.FAILED and instance.pending is None:
                del self.state.instances[instance.unit]

    def _reconfigure(self, event: Reconfigured, now: float) -> list[Action]:
        state, before, known = self.state, self.state.config, self.state.definitions
        state.config, state.definitions, state.host_ram_bytes = event.config, event.definitions, event.ram_bytes
        state.gauged = {
            name: budget for name, budget in state.gauged.items() if learning.same_gauge(name, before, event.config)
        }
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
        state.crowded = {name: since for name, since in state.crowded.items() if name in event.config.models}
        state.preload = {name for name in state.preload if name in event.config.models}
        state.trials = {name for name in state.trials if name in event.config.models}
        state.preload |= {model.name for model in new if replicas.standing(model)}
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
