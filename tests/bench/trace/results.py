"""What a replay came to: figures per trace and target, and how they are shown."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from replay import Outcome
from targets import Counts

__all__ = ["Result", "as_json", "as_table", "ratios"]

_PERCENTILES = (50, 95, 99)
_ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One trace against one target."""

    trace: str
    target: str
    counts: Counts | None
    outcomes: tuple[Outcome, ...]

    @property
    def waits(self) -> list[float]:
        """Times to the first token in seconds at scale 1, ascending."""
        return sorted(outcome.first_token_s for outcome in self.outcomes if outcome.first_token_s is not None)

    @property
    def mean_s(self) -> float:
        return sum(self.waits) / len(self.waits) if self.waits else math.nan

    def percentile_s(self, percent: float) -> float:
        """The least time within which `percent` of the requests had their first token."""
        waits = self.waits
        return waits[max(0, math.ceil(len(waits) * percent / 100) - 1)] if waits else math.nan

    @property
    def errors(self) -> Counter[str]:
        return Counter(outcome.error for outcome in self.outcomes if outcome.error)

    @property
    def late_s(self) -> float:
        """How far the load generator itself fell behind, at most."""
        return max((outcome.late_s for outcome in self.outcomes), default=0.0)


def as_json(results: Sequence[Result]) -> list[dict[str, object]]:
    return [
        {
            "trace": result.trace,
            "target": result.target,
            "requests": len(result.outcomes),
            "mean_s": result.mean_s,
            **{f"p{percent}_s": result.percentile_s(percent) for percent in _PERCENTILES},
            "max_s": result.percentile_s(100),
            "counts": result.counts and {**asdict(result.counts), "swaps": result.counts.swaps},
            "errors": dict(result.errors),
            "late_s": result.late_s,
            "outcomes": [asdict(outcome) for outcome in result.outcomes],
        }
        for result in results
    ]


def as_table(results: Sequence[Result]) -> str:
    """Grouped by trace, and under the table what went wrong."""
    header = (
        "trace",
        "target",
        "requests",
        "mean",
        *(f"p{percent}" for percent in _PERCENTILES),
        "max",
        "swaps",
        "starts",
        "errors",
    )
    ordered = sorted(results, key=lambda result: _order(results).index(result.trace))
    return "\n".join((*_aligned([header, *map(_row, ordered)]), *_notes(ordered)))


def ratios(results: Sequence[Result]) -> str:
    """Mean and maximum of every target in multiples of the first one's, per trace."""
    first, *others = dict.fromkeys(result.target for result in results)
    found = {(result.trace, result.target): result for result in results}
    rows = [(f"mean (max), {first} = 1", *others)]
    for trace in _order(results):
        base = found[trace, first]
        rows.append((trace, *(_ratio(found[trace, other], base) for other in others)))
    return "\n".join(_aligned(rows, texts=1))


def _order(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.trace for result in results))


def _ratio(result: Result, base: Result) -> str:
    return f"{result.mean_s / base.mean_s:.2f} ({result.percentile_s(100) / base.percentile_s(100):.2f})"


def _row(result: Result) -> tuple[str, ...]:
    times = (result.mean_s, *map(result.percentile_s, (*_PERCENTILES, 100)))
    counts = ("-", "-") if result.counts is None else (str(result.counts.swaps), str(result.counts.starts))
    errors = str(sum(result.errors.values()))
    return (result.trace, result.target, str(len(result.outcomes)), *(f"{time_s:.2f} s" for time_s in times), *counts, errors)


def _notes(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        where = f"{result.trace}, {result.target}"
        if result.counts is not None and result.counts.out_of_memory:
            yield f"{where}: {result.counts.out_of_memory} engines died of out-of-memory"
        for error, count in result.errors.most_common(_ERRORS_SHOWN):
            yield f"{where}: {count} x {error}"


def _aligned(rows: Sequence[Sequence[str]], texts: int = 2) -> list[str]:
    """The first `texts` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cell(row, widths, column, texts) for column in range(len(row))).rstrip() for row in rows]


def _cell(row: Sequence[str], widths: Sequence[int], column: int, texts: int) -> str:
    text, width = row[column], widths[column]
    return text.ljust(width) if column < texts else text.rjust(width)
