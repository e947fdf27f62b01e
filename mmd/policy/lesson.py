"""What has been learned of a model by running it, times and sizes: of one definition of it, and across restarts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Lesson"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """The priors are a medium model's; sizes are bytes per GPU, 0 where nothing was measured."""

    start_s: float = 60.0
    """The last start, until its engine had answered."""
    wake_s: float = 3.0
    peak_bytes: int = 0
    """The most that its processes were seen to hold."""
    raised_bytes: int = 0
    """What it is reckoned with since it ran out of what was declared or estimated."""
    held_bytes: Mapping[int, int] = field(default_factory=dict)
    """What its last sleep left, by level."""
