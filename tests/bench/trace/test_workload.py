"""The traces are what the benchmark says they are, and the same for everybody."""

from collections import Counter
from itertools import pairwise

import pytest
from workload import NAMES, Request, Trace, make_trace

LONG_S = 8_000.0


def trace(name: str, seed: int = 1) -> Trace:
    return make_trace(name, seed=seed, duration_s=LONG_S, decode_s=8)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_determines_a_trace(name: str) -> None:
    assert trace(name) == trace(name)
    assert trace(name) != trace(name, seed=2)


@pytest.mark.parametrize(("name", "rate"), [("zipf-0.6", 0.6), ("zipf-2", 2), ("bursts", 5 / 8), ("hot-cold", 4 + 1 / 15)])
def test_requests_come_in_order_at_the_promised_rate(name: str, rate: float) -> None:
    requests = trace(name).requests
    assert len(requests) / LONG_S == pytest.approx(rate, rel=0.05)
    assert all(before.at_s <= after.at_s for before, after in pairwise(requests))
    assert sum(request.decode_s for request in requests) / len(requests) == pytest.approx(8, rel=0.05)


def test_popularity_follows_zipf() -> None:
    requests = trace("zipf-2").requests
    asked = Counter(request.model for request in requests)
    for rank in range(4):
        assert asked[rank] / len(requests) == pytest.approx(12 / 25 / (rank + 1), rel=0.05)


def test_a_burst_is_for_one_model_and_short() -> None:
    bursts: dict[float, list[Request]] = {}
    for request in trace("bursts").requests:
        bursts.setdefault(request.at_s // 8, []).append(request)
    assert len(bursts) == LONG_S / 8
    for number, burst in bursts.items():
        assert 3 <= len(burst) <= 7
        assert len({request.model for request in burst}) == 1
        assert burst[-1].at_s - 8 * number < 1


def test_the_cold_model_is_asked_every_15_s() -> None:
    cold = [request.at_s for request in trace("hot-cold").requests if request.model == 1]
    assert {round(after - before, 6) for before, after in pairwise(cold)} == {15.0}
