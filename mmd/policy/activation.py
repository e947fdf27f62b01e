"""From demand to a running model: claims are made, victims leave, the unit starts or wakes."""

from mmd.config import Model
from mmd.names import UnitName
from mmd.policy.actions import Action, Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.admission import misfit_of, refuse_all
from mmd.policy.events import Phase
from mmd.policy.forecast import comes_in_s
from mmd.policy.instance import Claim, Instance
from mmd.policy.ledger import RAM, covers, more_of
from mmd.policy.placing import plan
from mmd.policy.state import State

__all__ = ["act", "advance", "demands", "make_claims", "not_before", "promise", "revise"]

# Below this the times that were learned say more about the machine's mood than about the model.
_LEAST_COST_S = 0.1


def demands(state: State, now: float) -> list[Model]:
    """Models that somebody waits for and that nothing is being done for yet, the next one first.

    By priority; then those whose oldest request has waited for policy.max_wait, the oldest first; then by how many requests a
    second of work serves (scheduling.md, 3), with the times that starting and waking took last. The time that they have waited
    counts as well: by number alone the rarely wanted would wait for max_wait each time.
    """
    wanted = [state.config.models[name] for name in state.queues if name not in state.claims]
    idle = [model for model in wanted if not _under_way(state, model)]
    return sorted(idle, key=lambda model: _turn(state, model, now))


def _turn(state: State, model: Model, now: float) -> tuple[int, bool, float, float]:
    queue = state.queues[model.name]
    oldest = queue[0].since
    in_time = now - oldest < state.config.policy.max_wait_s
    cost_s = max(comes_in_s(state, model), _LEAST_COST_S)
    waited_s = sum(now - waiter.since for waiter in queue)
    return (-model.priority, in_time, -(len(queue) + waited_s / cost_s) if in_time else 0.0, oldest)


def _under_way(state: State, model: Model) -> bool:
    """Whether an instance is ready or coming (more requests than it may take at once wait), or still on its way out."""
    return any(i.changing or i.phase is Phase.READY for i in state.instances_of(model))


def revise(state: State) -> None:
    """Drop claims that nobody waits for any more, those of models that came up by other means (`systemctl start`), and those
    for which what is free, and what is about to be, is no longer enough.

    The last are planned again in the same round: somebody else has taken memory meanwhile (foreign use, a sleep that kept
    more than expected), so more must leave.
    """
    for name, claim in list(state.claims.items()):
        wanted = name in state.preload | state.trials or name in (state.crowded if claim.beside else state.queues)
        free = state.free_later()  # less this claim's own need
        asleep = {RAM} if any(claim.victims.values()) else set()  # they take host memory
        broken = any(free.get(key, 0) < 0 for key in claim.need.keys() | asleep)
        overtaken = not claim.beside and _under_way(state, state.config.models[name])
        if not wanted or broken or overtaken:
            del state.claims[name]
    victims = {unit for claim in state.claims.values() for unit in claim.victims}
    for instance in state.instances.values():
        instance.gate_open = instance.unit not in victims and instance.release is None and not instance.retiring


def _left(state: State, claim: Claim) -> bool:
    """Whether every victim has gone where it was to go."""
    for unit, level in claim.victims.items():
        victim = state.instances.get(unit)
        if victim is None or victim.phase is Phase.FAILED:
            continue
        if victim.changing or victim.phase is Phase.READY or (level == 0 and victim.phase is Phase.SLEEPING):
            return False
    return True


def make_claims(state: State, now: float) -> list[Action]:
    """Promise memory to every model in demand that a place can be found for; refuse those for which there never will be one."""
    actions: list[Action] = []
    for model in demands(state, now):
        if (misfit := misfit_of(state, model)) is not None:
            actions += refuse_all(state, model.name, misfit.why, misfit.words, retry_after_s=misfit.retry_after_s)
        elif now >= not_before(state, model):
            impatient = now - state.queues[model.name][0].since >= state.config.policy.max_wait_s
            promise(state, plan(state, model, now, impatient=impatient))
    return actions


def promise(state: State, claim: Claim | None) -> None:
    """Put a claim in force, if one was found: its victims take no more requests."""
    if claim is None:
        return
    state.claims[claim.model] = claim
    for unit in claim.victims:
        state.instances[unit].gate_open = False


def not_before(state: State, model: Model) -> float:
    """When a model may start or wake again: after a failure, after idle.min_sleep."""
    failures = state.failures.get(model.name)
    asleep = (i.since + model.idle.min_sleep_s for i in state.instances_of(model) if i.phase is Phase.SLEEPING)
    return max((failures.retry_at if failures else 0.0, *asleep))


def advance(state: State, now: float) -> list[Action]:
    """Move every claim on, oldest first: send idle victims away, then start or wake the unit once there is room."""
    actions: list[Action] = []
    for name, claim in sorted(state.claims.items(), key=lambda item: item[1].since):
        for unit, level in claim.victims.items():
            actions += _send_away(state, unit, level, now)
        if _left(state, claim) and not state.locked(claim.unit.placement) and covers(state.free_now(), claim.need):
            del state.claims[name]
            actions.append(_activate(state, claim, now))
    return actions


def _send_away(state: State, unit: UnitName, level: int, now: float) -> list[Action]:
    victim = state.instances.get(unit)
    if victim is None or victim.changing or victim.load or victim.release is not None or victim.phase is Phase.FAILED:
        return []
    if victim.phase is Phase.SLEEPING and level > 0:
        return []
    return act(state, victim, level, now)


def act(state: State, instance: Instance, level: int, now: float) -> list[Action]:
    """Put an instance to sleep at `level`, or stop it (0), as soon as the lock on its GPUs and the host memory are free."""
    loading = instance.phase is Phase.STARTING
    if now < instance.retry_at or (state.locked(instance.unit.placement) and not loading):
        return []
    if instance.unit in state.lent:
        instance.wanted = True
        return []
    action: UnitAction
    if level and instance.phase is Phase.READY and instance.model is not None:
        after = instance.holds_after(level, held_bytes=state.held_asleep(instance, level))
        if not covers(state.free_now(), more_of(after, instance.holds())):
            return []
        held = max((after[gpu] for gpu in instance.unit.placement.gpus), default=0)
        action = Sleep(instance.unit, level, int(held), state.next_serial())
    else:
        action = Stop(instance.unit, state.next_serial())
    instance.pending = action
    instance.since = now
    return [action]


def _activate(state: State, claim: Claim, now: float) -> UnitAction:
    instance = state.instances.get(claim.unit)
    if instance is not None and instance.phase is Phase.SLEEPING:
        instance.pending = Wake(claim.unit, instance.level, state.next_serial())
    else:
        model = state.config.models[claim.model]
        definition = state.definitions.get(claim.model, "")
        vram_bytes = state.vram_of(model)
        instance = Instance(claim.unit, model, Phase.STARTING, now, vram_bytes=vram_bytes, definition=definition)
        instance.pending = Start(claim.unit, state.next_serial())
        state.instances[claim.unit] = instance
    instance.since = now
    assert isinstance(instance.pending, Start | Wake)
    return instance.pending
