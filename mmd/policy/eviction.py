"""Which residents leave so that another model fits, and how far each goes down: the victim set.

A resident leaves by one of its options, the shallowest first: sleep at level 1, which takes host memory for what it frees, then
at level 2, then stop. `lru` takes the least recently used until enough is free, as shallow as memory permits. `min_loss` takes
the *set*, with a level for each, whose total loss is smallest, the loss of an option being how often the resident is asked for
times how long it takes to come back (scheduling.md, 4 and 5). Up to `_EXHAUSTIVE` candidates are searched by branch and bound
from what the greedy choice came to; beyond that the greedy choice is all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmd.config import Evict
from mmd.names import UnitName
from mmd.policy.ledger import Amounts, Key, plus

__all__ = ["Candidate", "Option", "choose_victims"]

_EXHAUSTIVE = 12

# Steps of the search, 10 ms: what so many have not found is not worth holding up the gateway for.
_STEPS_MAX = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way for a resident to leave."""

    level: int
    """It sleeps at this level; 0: it stops."""
    freed: Amounts
    """What comes free; negative where more is held afterwards (host memory)."""
    loss: float
    """Expected seconds of waiting, per second, that this costs."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A resident that may leave."""

    unit: UnitName
    last_used: float
    options: tuple[Option, ...]
    """The shallowest first."""


_Chosen = Mapping[Candidate, Option]


def choose_victims(
    candidates: Sequence[Candidate], need: Amounts, free: Amounts, evict: Evict, *, thorough: bool = True
) -> dict[UnitName, int] | None:
    """The residents to remove so that `need` fits into `free` and what they free, each with the level it goes down to
    (0: stop); None: none will do.

    With `thorough` false no sets are tried, but the cheapest candidates taken one by one.
    """
    room = _Room(need, free, candidates)
    helpful = [c for c in candidates if any(room.helps(option.freed) for option in c.options)]
    if evict is Evict.LRU:
        chosen = _one_by_one(sorted(helpful, key=lambda c: (c.last_used, c.unit)), room)
    else:
        helpful.sort(key=lambda c: (c.options[-1].loss, c.last_used, c.unit))
        chosen = _one_by_one(helpful, room)
        if chosen is not None and thorough and len(helpful) <= _EXHAUSTIVE:
            chosen = _Search(helpful, room, chosen).best
    return None if chosen is None else {candidate.unit: option.level for candidate, option in chosen.items()}


class _Room:
    """What is short of what is needed, as victims are added: numbers by position of a fixed list of resources."""

    __slots__ = ("keys", "short")

    def __init__(self, need: Amounts, free: Amounts, candidates: Sequence[Candidate]) -> None:
        taken = {key for c in candidates for option in c.options for key, amount in option.freed.items() if amount < 0}
        self.keys: tuple[Key, ...] = (*need, *(key for key in sorted(taken, key=str) if key not in need))
        # Of what only victims would take, a shortage that is there already is nobody's fault.
        self.short = tuple(need[key] - free.get(key, 0) if key in need else -max(0, free.get(key, 0)) for key in self.keys)

    def after(self, freed: Amounts) -> tuple[float, ...]:
        """What is short of each resource once that much comes free; nothing above 0 means that all fits."""
        return tuple(short - freed.get(key, 0) for key, short in zip(self.keys, self.short, strict=True))

    def fits(self, options: Iterable[Option]) -> bool:
        return max(self.after(plus(option.freed for option in options)), default=0) <= 0

    def helps(self, freed: Amounts) -> bool:
        """Whether it frees anything that is needed, or that another victim's sleep would take."""
        return any(freed.get(key, 0) > 0 for key in self.keys)


def _one_by_one(ordered: Sequence[Candidate], room: _Room) -> _Chosen | None:
    """Candidates in the given order, asleep as long as that is enough; then as deep as need be, again in that order."""
    chosen: dict[Candidate, Option] = {}
    needed = {key for key, short in zip(room.keys, room.short, strict=True) if short > 0}
    for candidate in ordered:
        missing = room.after(plus(option.freed for option in chosen.values()))
        short = {key for key, amount in zip(room.keys, missing, strict=True) if amount > 0} & needed
        if not short:
            break
        lightest = candidate.options[0]
        if lightest.level and any(lightest.freed.get(key, 0) > 0 for key in short):
            chosen[candidate] = lightest
    for candidate in ordered:
        missing = room.after(plus(option.freed for option in chosen.values()))
        deepest, now = candidate.options[-1].freed, chosen[candidate].freed if candidate in chosen else {}
        short = {key for key, amount in zip(room.keys, missing, strict=True) if amount > 0}
        if any(deepest.get(key, 0) > now.get(key, 0) for key in short):
            chosen[candidate] = candidate.options[-1]
    return _lightened(chosen, room) if room.fits(chosen.values()) else None


def _lightened(chosen: dict[Candidate, Option], room: _Room) -> _Chosen:
    """Less those that turned out not to be needed, the last taken first; the others as shallow as memory permits, the costliest
    first."""
    for candidate in tuple(reversed(chosen)):
        rest = {other: option for other, option in chosen.items() if other is not candidate}
        if room.fits(rest.values()):
            chosen = rest
    for candidate in sorted(chosen, key=lambda c: (-c.options[-1].loss, -c.last_used, c.unit)):
        for option in candidate.options:
            if room.fits({**chosen, candidate: option}.values()):
                chosen[candidate] = option
                break
    return chosen


_Cost = tuple[float, int, int, float]


class _Search:
    """Branch and bound over who leaves and how. A step decides one candidate: it stays, or leaves by one of its options."""

    def __init__(self, candidates: Sequence[Candidate], room: _Room, found: _Chosen) -> None:
        self.best: _Chosen = found
        self._cost: _Cost = (0.0, 0, 0, 0.0)
        for candidate, option in found.items():
            self._cost = _added(self._cost, candidate, option)
        self._candidates = candidates
        self._freed = [[tuple(o.freed.get(key, 0) for key in room.keys) for o in c.options] for c in candidates]
        self._most = self._suffix_sums(len(room.keys))
        self._steps = 0
        self._descend(0, room.short, (0.0, 0, 0, 0.0), {})

    def _suffix_sums(self, width: int) -> list[tuple[float, ...]]:
        """What the candidates from each position on could free at most."""
        most = [(0.0,) * width]
        for options in reversed(self._freed):
            each = (max(0.0, *(freed[key] for freed in options)) for key in range(width))
            most.append(tuple(a + b for a, b in zip(most[-1], each, strict=True)))
        return most[::-1]

    def _descend(self, position: int, short: Sequence[float], cost: _Cost, chosen: _Chosen) -> None:
        self._steps += 1
        if cost >= self._cost or self._steps > _STEPS_MAX:
            return
        if max(short, default=0) <= 0:
            self.best, self._cost = chosen, cost
            return
        if any(s > most for s, most in zip(short, self._most[position], strict=True)):
            return
        candidate = self._candidates[position]
        for option, freed in zip(candidate.options, self._freed[position], strict=True):
            less = [s - f for s, f in zip(short, freed, strict=True)]
            self._descend(position + 1, less, _added(cost, candidate, option), {**chosen, candidate: option})
        self._descend(position + 1, short, cost, chosen)


def _added(cost: _Cost, candidate: Candidate, option: Option) -> _Cost:
    """Smallest loss first; then the fewest stops, the fewest victims, and the set whose latest use was longest ago. Each part
    only grows with every victim, which is what makes it a bound."""
    loss, stops, victims, last_used = cost
    return (loss + option.loss, stops + (option.level == 0), victims + 1, max(last_used, candidate.last_used))
