"""Which residents leave so that another model fits: the victim set.

`lru` takes the least recently used until enough is free. `min_loss` takes the *set* with the smallest total loss, the loss of a
resident being how often it is asked for times how long it takes to come back (scheduling.md, 4); recency breaks ties. All
subsets are tried up to `_EXHAUSTIVE` candidates (4,096 sets, some milliseconds); beyond that, cheapest first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from mmd.config import Evict
from mmd.names import UnitName
from mmd.policy.ledger import Amounts, covers, plus

__all__ = ["Candidate", "choose_victims"]

_EXHAUSTIVE = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """A resident that may leave."""

    unit: UnitName
    last_used: float
    loss: float
    """Expected seconds of waiting, per second, that its absence costs."""
    freed_asleep: Amounts
    """What its deepest permitted sleep frees; empty when it may not sleep (or sleeps already)."""
    sleep_level: int
    freed_stopped: Amounts


def choose_victims(
    candidates: Sequence[Candidate], missing: Amounts, evict: Evict, *, thorough: bool = True
) -> dict[UnitName, int] | None:
    """The residents to remove so that `missing` comes free, each with the level it goes down to (0: stop); None: none will do.

    Sets that only sleep are preferred to sets in which somebody must stop, since sleepers come back ten times faster. With
    `thorough` false no sets are tried, but the cheapest candidates taken one by one.
    """
    choose = _least_recent if evict is Evict.LRU else _least_loss if thorough else _least_loss_each
    asleep = choose([c for c in candidates if c.sleep_level], missing, lambda c: c.freed_asleep)
    if asleep is not None:
        return {candidate.unit: candidate.sleep_level for candidate in asleep}
    stopped = choose(candidates, missing, lambda c: c.freed_stopped)
    if stopped is None:
        return None
    return _soften(stopped, missing)


def _soften(stopped: Sequence[Candidate], missing: Amounts) -> dict[UnitName, int]:
    """Let as many members of a set as memory permits sleep instead of stop, the costliest first."""
    levels = {candidate.unit: 0 for candidate in stopped}
    for candidate in sorted(stopped, key=lambda c: (-c.loss, -c.last_used, c.unit)):
        if not candidate.sleep_level:
            continue
        levels[candidate.unit] = candidate.sleep_level
        freed = plus(c.freed_asleep if levels[c.unit] else c.freed_stopped for c in stopped)
        if not covers(freed, missing):
            levels[candidate.unit] = 0
    return levels


_Freed = Callable[[Candidate], Amounts]


def _least_recent(candidates: Sequence[Candidate], missing: Amounts, freed: _Freed) -> Sequence[Candidate] | None:
    return _cheapest_first(sorted(candidates, key=lambda c: (c.last_used, c.unit)), missing, freed)


def _least_loss(candidates: Sequence[Candidate], missing: Amounts, freed: _Freed) -> Sequence[Candidate] | None:
    helpful = [c for c in candidates if any(freed(c).get(key, 0) > 0 for key in missing)]
    if len(helpful) > _EXHAUSTIVE:
        return _least_loss_each(helpful, missing, freed)
    enough = [chosen for chosen in _subsets(helpful) if covers(plus(map(freed, chosen)), missing)]
    return min(enough, key=_cost, default=None)


def _least_loss_each(candidates: Sequence[Candidate], missing: Amounts, freed: _Freed) -> Sequence[Candidate] | None:
    return _cheapest_first(sorted(candidates, key=lambda c: (c.loss, c.last_used, c.unit)), missing, freed)


def _subsets(candidates: Sequence[Candidate]) -> Iterable[tuple[Candidate, ...]]:
    for size in range(1, len(candidates) + 1):
        yield from combinations(candidates, size)


def _cost(chosen: Sequence[Candidate]) -> tuple[float, int, float, list[UnitName]]:
    """Smallest loss; then fewest victims; then the set whose most recent member was used longest ago."""
    return (sum(c.loss for c in chosen), len(chosen), max(c.last_used for c in chosen), sorted(c.unit for c in chosen))


def _cheapest_first(ordered: Sequence[Candidate], missing: Amounts, freed: _Freed) -> Sequence[Candidate] | None:
    """Candidates in the given order until enough is free, less those that turned out not to be needed."""
    chosen: list[Candidate] = []
    for candidate in ordered:
        if covers(plus(map(freed, chosen)), missing):
            break
        if any(freed(candidate).get(key, 0) > 0 for key in missing):
            chosen.append(candidate)
    if not covers(plus(map(freed, chosen)), missing):
        return None
    for candidate in tuple(reversed(chosen)):
        rest = [c for c in chosen if c is not candidate]
        if covers(plus(map(freed, rest)), missing):
            chosen = rest
    return chosen
