"""What an action on a unit came to, in seconds and bytes: one line, the same for the journal and for whoever asked for it."""

from dataclasses import dataclass

from mmd.policy.actions import Sleep, Start, Stop, Wake
from mmd.policy.events import Done
from mmd.policy.instance import Instance
from mmd.quantity import human_duration, size_on_gpus

__all__ = ["Outcome", "held_bytes"]

_VERBS = {Start: "ready", Wake: "awake", Sleep: "slept", Stop: "stopped"}


def held_bytes(instance: Instance) -> int:
    """GPU memory that an instance is reckoned to hold now, per GPU."""
    holds = instance.holds()
    return max((int(holds.get(gpu, 0)) for gpu in instance.unit.placement.gpus), default=0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`str` makes the line: `slept in 2.1 s, freed 17.9 GiB, 1.2 GiB still held`."""

    done: Done
    reckoned_bytes: int = 0
    """What the unit was reckoned to hold per GPU, until the action ended."""

    def __str__(self) -> str:
        action, elapsed = self.done.action, human_duration(self.done.elapsed_s)
        if not self.done.ok:
            reason = self.done.observed.reason or f"it is {self.done.observed.phase}"
            return f"{type(action).__name__.lower()} failed after {elapsed}: {reason}"
        return f"{_VERBS[type(action)]} in {elapsed}{self.sizes}"

    @property
    def sizes(self) -> str:
        """`, 17.9 GiB`; of several GPUs `, 2 x 8.9 GiB`; nothing for a model that uses none."""
        gpus = len(self.done.action.unit.placement.gpus)
        if not gpus:
            return ""
        match self.done.action:
            case Start() | Wake():
                measured = self.done.held_bytes
                words = size_on_gpus(self.held_bytes, gpus)
            case Sleep():
                measured = self.done.freed_bytes
                words = f"freed {size_on_gpus(self.freed_bytes, gpus)}, {size_on_gpus(self.held_bytes, gpus)} still held"
            case Stop():
                measured = self.done.freed_bytes
                words = f"freed {size_on_gpus(self.freed_bytes, gpus)}"
        return f", {words}" if measured is not None else f", {words} (not measured)"

    @property
    def held_bytes(self) -> int:
        """What the unit holds per GPU since: measured, else reckoned."""
        if self.done.held_bytes is not None:
            return self.done.held_bytes
        match self.done.action:
            case Stop():
                return 0
            case Sleep(expected_bytes=expected):
                return expected
        return self.reckoned_bytes

    @property
    def freed_bytes(self) -> int:
        """What a sleep or a stop freed per GPU: measured, else reckoned."""
        return self.reckoned_bytes - self.held_bytes if self.done.freed_bytes is None else self.done.freed_bytes
