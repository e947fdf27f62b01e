"""Instances that leave for their own sake: on an operator's word, after a change of definition, or idle for long enough."""

from collections.abc import Iterator

from mmd.config import Model
from mmd.policy.actions import Action, Start
from mmd.policy.activation import act
from mmd.policy.events import Phase
from mmd.policy.instance import Instance
from mmd.policy.ledger import RAM
from mmd.policy.placing import rest_level, settled_at, sleep_levels
from mmd.policy.state import State

__all__ = ["deadlines", "retire"]


def retire(state: State, now: float) -> list[Action]:
    """Stop or sleep what is released, stale or idle, as far as its requests and the GPU locks allow."""
    actions: list[Action] = []
    victims = {unit for claim in state.claims.values() for unit in claim.victims}
    for instance in list(state.instances.values()):
        if not _free_to_act(instance) or (instance.unit in victims and instance.release is None):
            continue
        stale_s = 0.0 if instance.stale_since is None else now - instance.stale_since
        instance.retiring = stale_s >= state.config.policy.max_wait_s > 0
        level = _due(state, instance, now)
        if level is not None:
            actions += act(state, instance, level, now)
    return actions


def _free_to_act(instance: Instance) -> bool:
    """Whether nothing is pending on it, or only a start that an operator wants to end."""
    if instance.pending is None:
        return True
    return isinstance(instance.pending, Start) and instance.release is not None and instance.release.level == 0


def _due(state: State, instance: Instance, now: float) -> int | None:
    """The level to take an instance down to at this moment (0: stop), or None to leave it alone."""
    if instance.release is not None:
        if instance.phase is Phase.STOPPING or (instance.load and not instance.release.force):
            return None
        return _released_to(state, instance, instance.release.level)
    if instance.phase not in (Phase.READY, Phase.SLEEPING):
        return None
    if instance.stale_since is not None:
        return 0 if not instance.load else None
    if instance.model is None or instance.load or state.waiters_of(instance.unit):
        return None
    timers = dict(_idle_timers(state, instance, instance.model))
    return min((level for level, at in timers.items() if at <= now), default=None)


def _released_to(state: State, instance: Instance, level: int) -> int:
    """The level that an operator asked for, or the next deeper one that the model permits, while host memory is short."""
    if level and state.free_later().get(RAM, 0) < 0:  # which reckons with the level asked for
        return next((deeper for deeper in sleep_levels(instance) if deeper > level), 0)
    return level


def _idle_timers(state: State, instance: Instance, model: Model) -> Iterator[tuple[int, float]]:
    """Level and time of each idle timer that runs for an instance, counted from max(ready, last activity)."""
    if model.replicas.min and sum(i.phase is Phase.READY for i in state.instances_of(model)) <= model.replicas.min:
        return
    idle, earliest = model.idle, 0.0 if instance.last_activity else instance.spared_until
    if idle.stop_after_s is not None:
        yield 0, max(earliest, max(instance.ready_since or 0.0, instance.last_activity) + idle.stop_after_s)
    if idle.sleep_after_s is not None and instance.phase is Phase.READY and (level := rest_level(state, instance)):
        yield level, max(earliest, instance.idle_since + idle.sleep_after_s)


def deadlines(state: State, now: float) -> Iterator[float]:
    """Every time in the future at which the passing of time alone changes a decision."""
    for queue in state.queues.values():
        oldest = queue[0].since
        yield oldest + state.config.gateway.wait_limit_s
        yield from (waiter.since + waiter.wait_s for waiter in queue if waiter.wait_s is not None)
        yield oldest + state.config.policy.max_wait_s
    for failures in state.failures.values():
        yield failures.retry_at
    for instance in state.instances.values():
        yield instance.retry_at
        if instance.model is None or instance.phase not in (Phase.READY, Phase.SLEEPING):
            continue
        if state.queues:
            yield settled_at(state, instance)
            yield instance.since + instance.model.idle.min_sleep_s
        if instance.stale_since is not None:
            yield instance.stale_since + state.config.policy.max_wait_s
        if not instance.load:
            yield from (at for _, at in _idle_timers(state, instance, instance.model))
