"""Instances that no waiting request asks for by itself: those that stand by from the start (preload, replicas.min), and further
ones of a model that is asked for more than its instances should have at once (replicas.max).

A further instance goes to GPUs where the model is not yet, into free memory or in the place of residents that are idle and less
asked for than each of the model's instances would be. Nothing takes it down again but what takes down any other: it is the
first to be evicted, since its model goes on without it, and its idle timers run as soon as the others can do the work alone.
"""

from collections.abc import Iterator

from mmd.config import Model
from mmd.policy.activation import not_before, promise
from mmd.policy.admission import misfit_of, target_in_flight
from mmd.policy.events import Phase
from mmd.policy.instance import Failures, Instance
from mmd.policy.placing import plan, plan_beside
from mmd.policy.state import State

__all__ = ["deadlines", "make_claims", "standing", "watch"]

# A crowd must have lasted for as long as another instance takes to come up, or this: shorter ones are over before it helps.
_PATIENCE_S = 10.0


def standing(model: Model) -> int:
    """How many instances of a model are to be up without being asked for."""
    return max(model.replicas.min, int(model.preload))


def _up(state: State, model: Model) -> list[Instance]:
    """Its instances that are ready or about to be."""
    return [i for i in state.instances_of(model) if i.activating or (i.phase is Phase.READY and i.leaving_to() is None)]


def watch(state: State, now: float) -> None:
    """Note since when each model has had more to do than its instances should, and which lack some that are to stand by."""
    for model in state.config.models.values():
        if model.replicas.max > 1 and _crowded(state, model):
            state.crowded.setdefault(model.name, now)
        else:
            state.crowded.pop(model.name, None)
        if model.replicas.min > 1 and 0 < len(_up(state, model)) < model.replicas.min:
            state.preload.add(model.name)


def _crowded(state: State, model: Model) -> bool:
    up = _up(state, model)
    if not 0 < len(up) < model.replicas.max:
        return False
    load = sum(instance.load for instance in up) + len(state.queues.get(model.name, ()))
    return load > target_in_flight(model) * len(up)


def _patience_s(state: State, model: Model) -> float:
    lesson = state.lesson_of(model.name)
    asleep = [i.level for i in state.instances_of(model) if i.phase is Phase.SLEEPING]
    return min(_PATIENCE_S, lesson.wakes_in_s(min(asleep)) if asleep else lesson.starts_in_s)


def make_claims(state: State, now: float) -> None:
    """Claim places for instances that are to stand by, in free memory only, and for further ones of crowded models."""
    for name in sorted(state.preload - state.claims.keys()):
        _stand_by(state, state.config.models[name], now)
    for name in sorted(state.crowded.keys() - state.claims.keys()):
        model = state.config.models[name]
        failures = state.failures.get(name)
        due = max(state.crowded[name] + _patience_s(state, model), not_before(state, model))
        if now >= due and not (failures and failures.final):
            promise(state, plan_beside(state, model, now))


def _stand_by(state: State, model: Model, now: float) -> None:
    misfit, up = misfit_of(state, model), _up(state, model)
    # A preloaded model has been there once; one that is evicted by sleep comes back when it is asked for.
    enough = len(up) >= standing(model) or (not model.replicas.min and any(state.instances_of(model)))
    if misfit is not None and misfit.retry_after_s is None:
        state.preload.discard(model.name)
        state.failures[model.name] = Failures(0, now, now, misfit.words, ())
    elif enough:
        state.preload.discard(model.name)
    elif misfit is None and now >= not_before(state, model) and not any(i.changing for i in state.instances_of(model)):
        found = plan_beside(state, model, now, evict=False) if up else plan(state, model, now, impatient=False, evict=False)
        promise(state, found)


def deadlines(state: State) -> Iterator[float]:
    """When the passing of time alone makes a further instance worth having."""
    for name, since in state.crowded.items():
        yield since + _patience_s(state, state.config.models[name])
