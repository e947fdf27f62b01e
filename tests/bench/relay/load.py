"""wrk(1) against a port, and what processes use meanwhile."""

import os
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from yardsticks import BODY

__all__ = ["Load", "cpu_s", "median", "waited_s", "with_children", "wrk"]

_SCRIPT = f"""wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{BODY}'
"""
_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of wrk saw."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU time of the proxy per request; 0 where no process was named."""


def wrk(port: int, *, connections: int, seconds: int, pids: Iterable[int], folder: Path, close: bool = False) -> Load:
    """`close`: a new connection for each request."""
    script = folder / "post.lua"
    script.write_text(_SCRIPT + ('wrk.headers["Connection"] = "close"\n' if close else ""))
    before = cpu_s(pids)
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script, f"http://127.0.0.1:{port}/"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    used = cpu_s(pids) - before
    if "Non-2xx" in done:
        raise AssertionError(f"port {port}: not every answer was a 200\n{done}")
    found = re.search(r"(\d+) requests in", done)
    rate = re.search(r"Requests/sec: +([\d.]+)", done)
    assert found is not None
    assert rate is not None
    return Load(float(rate[1]), _percentile(done, 50), _percentile(done, 99), used / max(1, int(found[1])) * 1e6)


def _percentile(text: str, share: int) -> float:
    match = re.search(rf"^ +{share}% +([\d.]+)(us|ms|s)$", text, re.MULTILINE)
    assert match is not None, text
    return float(match[1]) * _MS[match[2]]


def cpu_s(pids: Iterable[int]) -> float:
    """CPU time that processes, and their children that still run, have used: proc_pid_stat(5)."""
    ticks = 0
    for pid in with_children(pids):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def waited_s(pids: Iterable[int]) -> float:
    """How long processes and their children had work, but no core: schedstat, documented in the kernel's sched-stats.rst."""
    waited_ns = 0
    for pid in with_children(pids):
        for task in Path(f"/proc/{pid}/task").iterdir():
            waited_ns += int((task / "schedstat").read_text().split()[1])
    return waited_ns / 1e9


def with_children(pids: Iterable[int]) -> list[int]:
    """Processes, and those that they have started."""
    found = []
    for pid in pids:
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += with_children(map(int, (task / "children").read_text().split()))
    return found


def median(loads: Iterable[Load]) -> Load:
    """Of each figure by itself."""
    rows = list(loads)
    return Load(*(statistics.median(getattr(row, name) for row in rows) for name in Load.__slots__))
