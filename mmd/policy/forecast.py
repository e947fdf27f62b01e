"""How long until a model serves a request, by what it took last: what those who wait, or come too early, are told."""

from mmd.config import Model
from mmd.policy.events import Phase
from mmd.policy.instance import Instance
from mmd.policy.state import State

__all__ = ["comes_in_s", "ready_in_s", "retry_after_s"]

# Less than a second means nothing to Retry-After; after more than ten minutes whoever asks may as well look again.
_LEAST_S = 1.0
_MOST_S = 600.0


def comes_in_s(state: State, model: Model) -> float:
    """How long a start of `model` is reckoned to take, or waking it where it sleeps, once there is room."""
    lesson = state.lesson_of(model.name)
    asleep = [instance.level for instance in state.instances_of(model) if instance.phase is Phase.SLEEPING]
    return lesson.wakes_in_s(min(asleep)) if asleep else lesson.starts_in_s


def ready_in_s(state: State, model: Model, now: float) -> float:
    """How long until an instance of `model` takes requests; 0 when one does. Those that share its GPUs and come first count."""
    instances = state.instances_of(model)
    if any(instance.usable for instance in instances):
        return 0.0
    coming = [_left_s(state, instance, now) for instance in instances if instance.activating]
    if coming:
        return min(coming)
    failures = state.failures.get(model.name)
    pause_s = failures.retry_at - now if failures else 0.0
    return max(_ahead_s(state, model, now), pause_s) + comes_in_s(state, model)


def retry_after_s(state: State, model: Model, now: float) -> float:
    """When a request for `model` that is turned away now would be served at once, if nobody else came: Retry-After."""
    wait_s = ready_in_s(state, model, now) or _turn_in_s(state, model, now)
    return min(max(wait_s, _LEAST_S), _MOST_S)


def _turn_in_s(state: State, model: Model, now: float) -> float:
    """How long until a model that is up and has its hands full is through with those who wait: as fast as they came, since as
    many must have been answered (Little's law)."""
    waiting = len(state.queues.get(model.name, ()))
    return (waiting + 1) / max(state.traffic_of(model.name).mean_rate(now), 1 / _MOST_S)


def _left_s(state: State, instance: Instance, now: float) -> float:
    """What is left of a start or a wake; at least a second, however long it is overdue."""
    model = instance.model or state.model_of(instance.unit)
    if model is None:
        return _LEAST_S
    lesson = state.lesson_of(model.name)
    took_s = lesson.wakes_in_s(instance.level) if instance.phase is Phase.SLEEPING else lesson.starts_in_s
    return max(took_s - (now - instance.since), _LEAST_S)


def _ahead_s(state: State, model: Model, now: float) -> float:
    """How long those take that come before `model` on GPUs that it may use, one after the other."""
    gpus = {gpu for placement in state.placements(model) for gpu in placement.gpus}
    under_way = [i for i in state.instances.values() if i.activating and gpus.intersection(i.unit.placement.gpus)]
    total_s = sum(_left_s(state, instance, now) for instance in under_way)
    coming = {instance.unit.id for instance in under_way}
    mine = state.queues.get(model.name)
    for name, queue in state.queues.items():
        other = state.config.models[name]
        first = mine is None or queue[0].since < mine[0].since or name in state.claims
        if name == model.name or other.id in coming or not first or any(i.usable for i in state.instances_of(other)):
            continue
        if gpus.intersection(gpu for placement in state.placements(other) for gpu in placement.gpus):
            total_s += comes_in_s(state, other)
    return total_s
