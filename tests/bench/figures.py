"""Figures: what was measured, the machine that it was measured on, and how both are shown."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Figure", "as_json", "as_table", "machine"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity, measured several times."""

    name: str
    unit: str
    samples: tuple[float, ...]
    aim: float | None = None
    """At most this, by the median; None: shown to explain another figure."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def machine() -> str:
    """The machine in a line: figures of different machines do not compare."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {name}, Linux {platform.release()}"


def as_json(figures: Iterable[Figure]) -> dict[str, object]:
    return {"machine": machine(), "figures": [{**asdict(figure), "median": figure.median} for figure in figures]}


def as_table(figures: Sequence[Figure]) -> str:
    header = ("", "median", "least", "most", "runs", "aim")
    rows = [header, *(_row(figure) for figure in figures)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.rjust, row, widths)) for row in [(name.ljust(widths[0]), *cells) for name, *cells in rows])
    return "\n".join((machine(), "", *lines))


def _row(figure: Figure) -> tuple[str, ...]:
    samples = (figure.median, min(figure.samples), max(figure.samples))
    aim = "" if figure.aim is None else f"{figure.aim:.0f} {figure.unit}"
    return (figure.name, *(f"{sample:.1f} {figure.unit}" for sample in samples), str(len(figure.samples)), aim)
