"""What an action came to is said in seconds and bytes, measured or not, on one GPU or several."""

import pytest

from mmd.gateway.outcome import Outcome
from mmd.names import CPU, Placement, UnitName
from mmd.policy.actions import Sleep, Start, Stop, UnitAction, Wake
from mmd.policy.events import Done, Observed, Phase

_GIB = 1 << 30
_ONE = UnitName("a", Placement((0,)))
_TWO = UnitName("a", Placement((0, 1)))
_CPU = UnitName("a", CPU)


def _outcome(action: UnitAction, held_gib: float | None = None, freed_gib: float | None = None, *, reason: str = "") -> Outcome:
    held, freed = (None if gib is None else int(gib * _GIB) for gib in (held_gib, freed_gib))
    seen = Observed(action.unit, Phase.FAILED if reason else Phase.READY, reason=reason)
    return Outcome(Done(action, seen, not reason, 2.13, held, freed), 19 * _GIB)


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (_outcome(Sleep(_ONE, 1, _GIB), 1.2, 17.9), "slept in 2.1 s, freed 17.9 GiB, 1.2 GiB still held"),
        (_outcome(Sleep(_ONE, 1, _GIB)), "slept in 2.1 s, freed 18.0 GiB, 1.0 GiB still held (not measured)"),
        (_outcome(Sleep(_TWO, 2, _GIB), 0.5, 8.9), "slept in 2.1 s, freed 2 x 8.9 GiB, 2 x 0.5 GiB still held"),
        (_outcome(Sleep(_ONE, 1, _GIB), 0.0, 17.9), "slept in 2.1 s, freed 17.9 GiB, 0.0 GiB still held"),
        (_outcome(Stop(_ONE), freed_gib=17.5), "stopped in 2.1 s, freed 17.5 GiB"),
        (_outcome(Stop(_TWO)), "stopped in 2.1 s, freed 2 x 19.0 GiB (not measured)"),
        (_outcome(Stop(_CPU)), "stopped in 2.1 s"),
        (_outcome(Start(_ONE), 17.5), "ready in 2.1 s, 17.5 GiB"),
        (_outcome(Wake(_TWO, 1)), "awake in 2.1 s, 2 x 19.0 GiB (not measured)"),
        (_outcome(Start(_CPU)), "ready in 2.1 s"),
        (_outcome(Start(_ONE), reason="it exited with status 3"), "start failed after 2.1 s: it exited with status 3"),
    ],
)
def test_lines(outcome: Outcome, line: str) -> None:
    assert str(outcome) == line


def test_what_is_not_known_by_reason_is_told_by_state() -> None:
    seen = Observed(_ONE, Phase.STOPPING)
    assert str(Outcome(Done(Stop(_ONE), seen, ok=False, elapsed_s=30))) == "stop failed after 30 s: it is stopping"
