"""Workers: processes that relay beside the one that decides (gateway.workers)."""

import os
from typing import Final

__all__ = ["worker_count"]

# `auto`: the machine's cores are the engines' first, and one process relays thousands of requests a second.
_CORES_PER_WORKER: Final = 8
_AUTO_MAX: Final = 4


def worker_count(configured: int | None) -> int:
    """Processes that relay; 1: the one that decides does so itself. `configured`: gateway.workers, None for auto."""
    return configured or max(1, min(_AUTO_MAX, len(os.sched_getaffinity(0)) // _CORES_PER_WORKER))
