"""Memory of processes: proc(5), smaps_rollup."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "children", "usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Resident set size, and the proportional one, in which what n processes share counts 1/n for each."""

    rss_mib: float
    pss_mib: float


def usage(proc: Path, pids: Iterable[int]) -> Usage:
    """Of some processes together."""
    rss = pss = 0
    for pid in pids:
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            key, _, value = line.partition(":")
            rss += int(value.split()[0]) if key == "Rss" else 0
            pss += int(value.split()[0]) if key == "Pss" else 0
    return Usage(rss / 1024, pss / 1024)


def children(proc: Path, pid: int) -> list[int]:
    return [int(child) for task in (proc / str(pid) / "task").iterdir() for child in (task / "children").read_text().split()]
