"""Where a model goes and who leaves for it: from demand to claim."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmd.config import Model
from mmd.engines import engine
from mmd.names import UnitName
from mmd.policy.events import Phase
from mmd.policy.eviction import Candidate, Option, choose_victims
from mmd.policy.instance import Claim, Instance
from mmd.policy.ledger import Key, awake_amounts, covers, minus, more_of
from mmd.policy.state import State

__all__ = ["plan", "plan_beside", "rest_level", "settled_at", "sleep_levels"]

# With more placements than this to compare, victims are taken one by one instead of trying all sets of them for each: 70 times
# 4,096 sets would hold up the gateway for half a second.
_THOROUGH_MAX = 8

# Requests per second that are reckoned with for a model that nobody has asked for: so a stop is worse than a sleep for it too.
_RATE_PRIOR = 1e-4


@dataclass(frozen=True, slots=True)
class _Terms:
    """On which terms residents may be asked to leave."""

    now: float
    evict: bool = True
    """Whether they may at all."""
    impatient: bool = False
    """Even those that are busy or have just come."""
    rate_below: float = math.inf
    """Only those that are asked for less often than this, in requests per second."""


def plan(state: State, model: Model, now: float, *, impatient: bool, evict: bool = True) -> Claim | None:
    """The cheapest way to give `model` a place, or None when there is none at present.

    A sleeping instance wakes where it is. Otherwise: a placement that needs no victims, the fullest one that fits (best fit:
    large holes stay); else the placement whose victims are the smallest loss. `impatient` allows victims that are busy or have
    just come (their gates will be closed and they drain), and a sleeper whose place cannot be had (a pinned model has taken it)
    to stop and start elsewhere; `evict` false allows no victims at all.
    """
    terms = _Terms(now, evict=evict, impatient=impatient)
    asleep = [i.unit for i in state.instances_of(model) if i.phase is Phase.SLEEPING]
    anywhere = [UnitName(model.id, placement) for placement in state.placements(model)]
    found = _best(state, model, asleep or anywhere, terms)
    if found is None and asleep and impatient:
        found = _best(state, model, [unit for unit in anywhere if unit not in asleep], terms)
        if found is not None:
            found.victims.update(dict.fromkeys(asleep, 0))
    return found


def plan_beside(state: State, model: Model, now: float, *, evict: bool = True) -> Claim | None:
    """A place for a further instance of `model`: where one of it sleeps, else on GPUs that none of it is on."""
    there = [i for i in state.instances_of(model) if i.phase is not Phase.FAILED]
    asleep = [i.unit for i in there if i.phase is Phase.SLEEPING]
    taken = {gpu for i in there for gpu in i.unit.placement.gpus}
    elsewhere = [UnitName(model.id, placement) for placement in state.placements(model) if taken.isdisjoint(placement.gpus)]
    rate = state.traffic_of(model.name).rate(now) / (len(there) - len(asleep) + 1)
    found = _best(state, model, asleep or elsewhere, _Terms(now, evict=evict, rate_below=rate))
    if found is not None:
        found.beside = True
    return found


def _best(state: State, model: Model, units: list[UnitName], terms: _Terms) -> Claim | None:
    free, thorough = state.free_later(), len(units) <= _THOROUGH_MAX
    found = (_claim(state, model, unit, free, terms, thorough=thorough) for unit in units)
    claims = [claim for claim in found if claim is not None]
    return min(claims, key=lambda c: _badness(state, c, free, terms.now), default=None)


def _claim(
    state: State, model: Model, unit: UnitName, free: Mapping[Key, float], terms: _Terms, *, thorough: bool
) -> Claim | None:
    there = state.instances.get(unit)
    holds = there.holds() if there else {}
    awake = awake_amounts(model, unit.placement, there.vram_bytes if there and holds else state.vram_of(model))
    need = more_of(awake, holds)
    victims: dict[UnitName, int] | None = {}
    if not covers(free, need):
        candidates = _candidates(state, unit, terms) if terms.evict else []
        victims = choose_victims(candidates, need, free, state.config.policy.evict, thorough=thorough)
    return None if victims is None else Claim(model.name, unit, terms.now, need, victims)


def _badness(state: State, claim: Claim, free: Mapping[Key, float], now: float) -> tuple[float, float, float, UnitName]:
    """Victims' loss first, then how many of them stop, then how much room is left over."""
    loss = sum(_loss(state, state.instances[unit], level, now) for unit, level in claim.victims.items())
    stops = sum(1 for level in claim.victims.values() if level == 0)
    left = sum(free.get(gpu, 0) - claim.need.get(gpu, 0) for gpu in claim.unit.placement.gpus)
    return (bool(claim.victims) + loss, stops, left, claim.unit)


def _candidates(state: State, target: UnitName, terms: _Terms) -> list[Candidate]:
    leaving = state.leaving()
    candidates = []
    for instance in state.resident():
        if instance.unit == target or instance.unit in leaving or not _may_leave(state, instance, terms):
            continue
        candidates.append(_candidate(state, instance, terms.now))
    return candidates


def _may_leave(state: State, instance: Instance, terms: _Terms) -> bool:
    if instance.model is None:
        return True
    if state.is_pinned(instance.model) or state.traffic_of(instance.model.name).rate(terms.now) >= terms.rate_below:
        return False
    wanted = state.waiters_of(instance.unit) > 0
    if instance.phase is Phase.SLEEPING:
        return not wanted
    settled = terms.now >= settled_at(state, instance)
    return terms.impatient or (settled and not wanted and not instance.load)


def settled_at(state: State, instance: Instance) -> float:
    """When an instance may be evicted: after policy.min_residency, or as long as coming back will take it, if that is less.

    So at most about half of the time goes into swapping, and one that wakes in a second does not hold the others up for ten,
    however long its first start took.
    """
    if instance.model is None:
        return instance.since
    lesson, levels = state.lesson_of(instance.model.name), sleep_levels(instance)
    back_s = lesson.wakes_in_s(levels[0]) if levels else lesson.starts_in_s
    return instance.since + min(state.config.policy.min_residency_s, back_s)


def _candidate(state: State, instance: Instance, now: float) -> Candidate:
    levels = (*sleep_levels(instance), 0) if instance.phase is Phase.READY else (0,)
    return Candidate(instance.unit, instance.idle_since, tuple(_option(state, instance, level, now) for level in levels))


def _option(state: State, instance: Instance, level: int, now: float) -> Option:
    after = instance.holds_after(level, held_bytes=state.held_asleep(instance, level))
    return Option(level, minus(instance.holds(), after), _loss(state, instance, level, now))


def sleep_levels(instance: Instance) -> tuple[int, ...]:
    """The levels that eviction and idling may put this instance to sleep at, the shallowest first; none when it cannot or may
    not sleep, or would free nothing."""
    if instance.model is None or not instance.model.gpu_count or not engine(instance.model.engine).can_sleep:
        return ()
    return tuple(range(1, instance.model.sleep_level + 1))


def rest_level(state: State, instance: Instance) -> int:
    """The shallowest sleep that host memory permits an idle instance; 0: none does."""
    free = state.free_later()
    for level in sleep_levels(instance):
        after = instance.holds_after(level, held_bytes=state.held_asleep(instance, level))
        if covers(free, more_of(after, instance.holds())):
            return level
    return 0


def _loss(state: State, instance: Instance, level: int, now: float) -> float:
    """Expected seconds of waiting, per second, once the instance has gone down to `level` (0: stopped)."""
    if instance.model is None or _dispensable(state, instance):
        return 0.0
    lesson = state.lesson_of(instance.model.name)
    cost_s = lesson.wakes_in_s(level) if level else lesson.starts_in_s
    if instance.phase is Phase.SLEEPING:
        cost_s = max(0.0, lesson.starts_in_s - lesson.wakes_in_s(instance.level))
    return (state.traffic_of(instance.model.name).rate(now) + _RATE_PRIOR) * cost_s


def _dispensable(state: State, instance: Instance) -> bool:
    """Whether its model goes on without it: all but the busiest of its ready instances are."""
    if instance.model is None or instance.model.replicas.max == 1:
        return False
    ready = [i for i in state.instances_of(instance.model) if i.phase is Phase.READY]
    return len(ready) > 1 and instance is not max(ready, key=lambda i: (i.load, i.last_activity, i.unit))
