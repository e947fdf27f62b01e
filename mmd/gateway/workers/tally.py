"""What a worker does with the units lent to it, in memory that the deciding process reads: no message for any request.

Each worker has a tally of its own and is the only one to write it, so nothing need be locked, and what a killed worker had in
flight is gone with its tally. A record per unit: requests in flight, requests that have come, time of the last one that came or
ended. Every number is 8 bytes, aligned, and stored at once, so that a reader sees the old value or the new one.
"""

import mmap
import os
from typing import Final

__all__ = ["UNITS_MAX", "Tally"]

UNITS_MAX: Final = 4096
_FIELDS: Final = 3
_BYTES: Final = 8


class Tally:
    """One worker's records; `slot` counts from 0 to UNITS_MAX - 1."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: of `make`, in either process; it is not kept."""
        memory = memoryview(mmap.mmap(descriptor, UNITS_MAX * _FIELDS * _BYTES))
        self._counts = memory.cast("q")
        self._times = memory.cast("d")

    @staticmethod
    def make() -> int:
        """A descriptor of memory for a tally, all zeros."""
        descriptor = os.memfd_create("mmd-tally")
        os.truncate(descriptor, UNITS_MAX * _FIELDS * _BYTES)
        return descriptor

    def begin(self, slot: int, now: float) -> None:
        """A request goes to the unit, at `now` of the monotonic clock."""
        at, counts = slot * _FIELDS, self._counts
        counts[at] += 1
        counts[at + 1] += 1
        self._times[at + 2] = now

    def end(self, slot: int, now: float) -> int:
        """A request has ended; how many are left."""
        at, counts = slot * _FIELDS, self._counts
        left = counts[at] = counts[at] - 1
        self._times[at + 2] = now
        return left

    def in_flight(self, slot: int) -> int:
        return self._counts[slot * _FIELDS]

    def arrived(self, slot: int) -> int:
        """Requests that have come, ever."""
        return self._counts[slot * _FIELDS + 1]

    def last_activity(self, slot: int) -> float:
        """When a request last came or ended; 0: never."""
        return self._times[slot * _FIELDS + 2]
