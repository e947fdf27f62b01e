"""Event streams: what the gateway adds to each event's latency, and what it costs. Their source and sink are streams.c."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from load import cpu_s, waited_s, with_children
from memory import usage

__all__ = ["EVENTS_PER_S", "PATTERNS", "Core", "Seen", "compile_streams", "print_table", "watch"]

EVENTS_PER_S: Final = 50
"""Of each stream, as in streams.c."""

PATTERNS: Final = {
    "spread evenly": 1,
    "in steps: 250 at once, as an engine's batch": 250,  # vLLM's max_num_seqs is 256
}
"""How many streams write at the same time."""

_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One run of the sink, and what the proxy used meanwhile."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    late_p99_ms: float
    """The source's own, which is not part of the latencies."""
    cores: float
    cpu_us: float
    """Per event."""
    waited: float
    """The share of the time in which the proxy had work and its core was another's: noise of the machine, not its own cost."""
    rss_mib: float


def compile_streams(folder: Path) -> Path:
    binary = folder / "streams"
    source = Path(__file__).with_name("streams.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", binary, source], check=True)
    return binary


@dataclass(frozen=True, slots=True)
class Core:
    """A core for some of the processes, from which `realtime` keeps others away, but for 5 % of the time: sched(7)."""

    number: int
    realtime: bool

    @contextmanager
    def holds(self, *pids: int) -> Iterator[None]:
        """Processes, with their threads and children."""
        before: dict[int, set[int]] = {}
        for pid in with_children(pids):
            for task in Path(f"/proc/{pid}/task").iterdir():
                before[int(task.name)] = os.sched_getaffinity(int(task.name))
                self._take(int(task.name))
        try:
            yield
        finally:
            for task_id, cores in before.items():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(task_id, cores)
                    os.sched_setscheduler(task_id, os.SCHED_OTHER, os.sched_param(0))

    def _take(self, task_id: int) -> None:
        os.sched_setaffinity(task_id, {self.number})
        if self.realtime:
            os.sched_setscheduler(task_id, os.SCHED_FIFO, os.sched_param(1))


def watch(binary: Path, endpoint: str, *, streams: int, batch: int, seconds: int, core: Core, pids: Sequence[int]) -> Seen:
    """Run the sink on a core. `pids`: the proxy's. AssertionError unless every stream was whole."""
    argv = [binary, "sink", endpoint, "streams", streams, seconds, batch]
    with subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True) as sink, core.holds(sink.pid):
        assert sink.stdout is not None
        if sink.stdout.readline() == "measuring\n":
            cpu, waited, begun = cpu_s(pids), waited_s(pids), time.monotonic()
            sink.stdout.readline()
            cpu, waited, elapsed_s = cpu_s(pids) - cpu, waited_s(pids) - waited, time.monotonic() - begun
            rss_mib = usage(Path("/proc"), with_children(pids)).rss_mib
        told = sink.communicate(timeout=_LIMIT_S)[0]
    if sink.returncode != 0:
        raise AssertionError(f"{endpoint}: not every stream came through: {told}")
    seen = json.loads(told)
    return Seen(
        p50_ms=seen["p50"] / 1000,
        p99_ms=seen["p99"] / 1000,
        max_ms=seen["max"] / 1000,
        late_p99_ms=seen["late_p99"] / 1000,
        cores=cpu / elapsed_s,
        cpu_us=cpu / seen["count"] * 1e6,
        waited=waited / elapsed_s,
        rss_mib=rss_mib,
    )


def print_table(rounds: Mapping[str, Sequence[Seen]]) -> None:
    """Medians. What is added is a difference of percentiles in one round."""
    times = ("p50", "p99", "max", "+p50", "+p99", "late p99")
    print(f"  {'ms':8}" + "".join(f"{name:>9}" for name in times) + f"{'cores':>8}{'us/event':>10}{'waited':>8}{'MiB':>7}")
    for name, found in rounds.items():
        pairs = list(zip(found, rounds["direct"], strict=True))
        cells = (
            _median(seen.p50_ms for seen in found),
            _median(seen.p99_ms for seen in found),
            _median(seen.max_ms for seen in found),
            _median(seen.p50_ms - direct.p50_ms for seen, direct in pairs),
            _median(seen.p99_ms - direct.p99_ms for seen, direct in pairs),
            _median(seen.late_p99_ms for seen in found),
        )
        line = f"  {name:8}" + "".join(f"{cell:9.3f}" for cell in cells)
        if name != "direct":
            line += f"{_median(seen.cores for seen in found):8.2f}{_median(seen.cpu_us for seen in found):10.1f}"
            line += f"{_median(seen.waited for seen in found):8.1%}{_median(seen.rss_mib for seen in found):7.1f}"
        print(line)


def _median(samples: Iterable[float]) -> float:
    return statistics.median(samples)
