"""Where a model goes and who leaves for it: from demand to claim."""

from collections.abc import Mapping

from mmd.config import Model
from mmd.engines import engine
from mmd.names import UnitName
from mmd.policy.events import Phase
from mmd.policy.eviction import Candidate, choose_victims
from mmd.policy.instance import Claim, Instance
from mmd.policy.ledger import Key, awake_amounts, minus, shortfall
from mmd.policy.state import State

__all__ = ["deepest_sleep", "plan"]

# With more placements than this to compare, victims are taken one by one instead of trying all sets of them for each: 70 times
# 4,096 sets would hold up the gateway for half a second.
_THOROUGH_MAX = 8


def plan(state: State, model: Model, now: float, *, impatient: bool, evict: bool = True) -> Claim | None:
    """The cheapest way to give `model` a place, or None when there is none at present.

    A sleeping instance wakes where it is. Otherwise: a placement that needs no victims, the fullest one that fits (best fit:
    large holes stay); else the placement whose victims are the smallest loss. `impatient` allows victims that are busy or have
    just come (their gates will be closed and they drain), and a sleeper whose place cannot be had (a pinned model has taken it)
    to stop and start elsewhere; `evict` false allows no victims at all.
    """
    asleep = [i.unit for i in state.instances_of(model) if i.phase is Phase.SLEEPING]
    anywhere = [UnitName(model.id, placement) for placement in state.placements(model)]
    found = _best(state, model, asleep or anywhere, now, impatient=impatient, evict=evict)
    if found is None and asleep and impatient:
        found = _best(state, model, [unit for unit in anywhere if unit not in asleep], now, impatient=True, evict=evict)
        if found is not None:
            found.victims.update(dict.fromkeys(asleep, 0))
    return found


def _best(state: State, model: Model, units: list[UnitName], now: float, *, impatient: bool, evict: bool) -> Claim | None:
    free, thorough = state.free_later(), len(units) <= _THOROUGH_MAX
    found = (_claim(state, model, unit, free, now, impatient=impatient, thorough=thorough) for unit in units)
    claims = [claim for claim in found if claim is not None and (evict or not claim.victims)]
    return min(claims, key=lambda c: _badness(state, c, free, now), default=None)


def _claim(
    state: State, model: Model, unit: UnitName, free: Mapping[Key, float], now: float, *, impatient: bool, thorough: bool
) -> Claim | None:
    there = state.instances.get(unit)
    holds = there.holds() if there else {}
    awake = awake_amounts(model, unit.placement, there.vram_bytes if there and holds else state.vram_of(model))
    need = {key: amount for key, amount in minus(awake, holds).items() if amount > 0}
    missing = shortfall(need, free)
    victims: dict[UnitName, int] | None = {}
    if missing:
        candidates = _candidates(state, unit, now, impatient)
        victims = choose_victims(candidates, missing, state.config.policy.evict, thorough=thorough)
    return None if victims is None else Claim(model.name, unit, now, need, victims)


def _badness(state: State, claim: Claim, free: Mapping[Key, float], now: float) -> tuple[float, float, float, UnitName]:
    """Victims' loss first, then how many of them stop, then how much room is left over."""
    loss = sum(_loss(state, state.instances[unit], now) for unit in claim.victims)
    stops = sum(1 for level in claim.victims.values() if level == 0)
    left = sum(free.get(gpu, 0) - claim.need.get(gpu, 0) for gpu in claim.unit.placement.gpus)
    return (bool(claim.victims) + loss, stops, left, claim.unit)


def _candidates(state: State, target: UnitName, now: float, impatient: bool) -> list[Candidate]:
    leaving = state.leaving()
    candidates = []
    for instance in state.resident():
        if instance.unit == target or instance.unit in leaving or not _may_leave(state, instance, now, impatient):
            continue
        candidates.append(_candidate(state, instance, now))
    return candidates


def _may_leave(state: State, instance: Instance, now: float, impatient: bool) -> bool:
    if instance.model is None:
        return True
    if instance.model.pin:
        return False
    wanted = state.waiters_of(instance.unit) > 0
    if instance.phase is Phase.SLEEPING:
        return not wanted
    settled = now >= instance.settled_at(state.config.policy.min_residency_s)
    return impatient or (settled and not wanted and not instance.in_flight)


def _candidate(state: State, instance: Instance, now: float) -> Candidate:
    level = deepest_sleep(instance) if instance.phase is Phase.READY else 0
    asleep = instance.holds_after(level, held_bytes=state.held_asleep(instance, level)) if level else instance.holds()
    return Candidate(
        unit=instance.unit,
        last_used=instance.idle_since,
        loss=_loss(state, instance, now),
        freed_asleep=minus(instance.holds(), asleep),
        sleep_level=level,
        freed_stopped=instance.holds(),
    )


def deepest_sleep(instance: Instance) -> int:
    """The level that eviction and idling put this instance to sleep at; 0: it cannot, may not, or would free nothing."""
    if instance.model is None or not instance.model.gpu_count or not engine(instance.model.engine).can_sleep:
        return 0
    return instance.model.sleep_level


def _loss(state: State, instance: Instance, now: float) -> float:
    if instance.model is None:
        return 0.0
    lesson = state.lesson_of(instance.model.name)
    if instance.phase is Phase.SLEEPING:
        cost_s = max(0.0, lesson.start_s - lesson.wake_s)
    else:
        cost_s = lesson.wake_s if deepest_sleep(instance) else lesson.start_s
    return state.traffic_of(instance.model.name).decayed(now) * cost_s
