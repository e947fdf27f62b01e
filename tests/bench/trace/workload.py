"""Seeded workloads: which model is asked for when, and for how long an answer. Times in seconds at scale 1.

Models are ranks: 0 is the most popular one. A trace depends on its name, the seed and the parameters, on nothing else.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["MODELS", "NAMES", "Request", "Trace", "make_trace"]

MODELS = 4
_POPULARITY = tuple(1 / rank for rank in range(1, MODELS + 1))
"""Zipf's law with exponent 1: 48, 24, 16 and 12 % of the requests."""

_BURST_EVERY_S = 8.0
_BURST_SIZES = (3, 7)
_BURST_LASTS_S = 0.5
_HOT_RATE = 4.0
_COLD_EVERY_S = 15.0

_LONGEST = 5.0
"""Of an answer, in means: an exponential tail would make the length of a run depend on a single request."""


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    model: int
    decode_s: float
    """How long its answer takes from the first token to the last."""


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    duration_s: float
    requests: tuple[Request, ...]
    """In the order of their times."""


_Arrivals = Iterator[tuple[float, int]]


def make_trace(name: str, *, seed: int, duration_s: float, decode_s: float) -> Trace:
    """One of `NAMES`; `decode_s` is the mean length of an answer, exponentially distributed."""
    dice = random.Random(f"{seed} {name}")
    arrivals = sorted(_SHAPES[name](dice, duration_s))
    requests = (Request(at_s, model, _length(dice, decode_s)) for at_s, model in arrivals if at_s < duration_s)
    return Trace(name, duration_s, tuple(requests))


def _length(dice: random.Random, mean_s: float) -> float:
    return min(dice.expovariate(1 / mean_s), _LONGEST * mean_s)


def _poisson(dice: random.Random, duration_s: float, rate: float) -> Iterator[float]:
    at_s = dice.expovariate(rate)
    while at_s < duration_s:
        yield at_s
        at_s += dice.expovariate(rate)


def _popular(dice: random.Random) -> int:
    return dice.choices(range(MODELS), _POPULARITY)[0]


def _zipf(rate: float) -> Callable[[random.Random, float], _Arrivals]:
    def arrivals(dice: random.Random, duration_s: float) -> _Arrivals:
        return ((at_s, _popular(dice)) for at_s in _poisson(dice, duration_s, rate))

    return arrivals


def _bursts(dice: random.Random, duration_s: float) -> _Arrivals:
    """Somebody's program asks one model several things at once, as agents and evaluations do."""
    for number in range(math.ceil(duration_s / _BURST_EVERY_S)):
        model = _popular(dice)
        for _ in range(dice.randint(*_BURST_SIZES)):
            yield number * _BURST_EVERY_S + dice.uniform(0, _BURST_LASTS_S), model


def _hot_and_cold(dice: random.Random, duration_s: float) -> _Arrivals:
    yield from ((at_s, 0) for at_s in _poisson(dice, duration_s, _HOT_RATE))
    yield from (((number + 0.5) * _COLD_EVERY_S, 1) for number in range(math.ceil(duration_s / _COLD_EVERY_S)))


_SHAPES: dict[str, Callable[[random.Random, float], _Arrivals]] = {
    "zipf-0.6": _zipf(0.6),
    "zipf-2": _zipf(2.0),
    "bursts": _bursts,
    "hot-cold": _hot_and_cold,
}

NAMES = tuple(_SHAPES)
