"""What has been learned of a model by running it, times and sizes: of one definition of it, and across restarts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Lesson"]

# Until it is known: a medium model's start. Waking from level 1 was published as 16 to 18 times as fast (engines.md); from
# level 2 the weights are read again, but nothing is compiled or captured.
_START_S = 60.0
_WAKE_SHARE = {1: 1 / 16, 2: 1 / 3}


@dataclass(frozen=True, slots=True)
class Lesson:
    """None: not seen yet. Sizes are bytes per GPU, 0 where nothing was measured."""

    start_s: float | None = None
    """The last start, until its engine had answered."""
    wake_s: float | None = None
    """The last wake from level 1, whose weights are in host memory."""
    reload_s: float | None = None
    """The last wake from level 2, its weights read again."""
    peak_bytes: int = 0
    """The most that its processes were seen to hold."""
    raised_bytes: int = 0
    """What it is reckoned with since it ran out of what was declared or estimated."""
    held_bytes: Mapping[int, int] = field(default_factory=dict)
    """What its last sleep left, by level."""

    @property
    def starts_in_s(self) -> float:
        """How long a start is reckoned to take."""
        return _START_S if self.start_s is None else self.start_s

    def wakes_in_s(self, level: int) -> float:
        """How long waking up from `level` is reckoned to take."""
        seen = self.wake_s if level == 1 else self.reload_s
        return self.starts_in_s * _WAKE_SHARE[level] if seen is None else seen
