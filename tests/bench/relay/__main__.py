"""The relay benchmark: what the gateway costs between a client and an engine that is ready. `tests/run --bench relay`

The gateway is the real one, installed in a private systemd (root), with its scheduler, broker and all; its engine is an nginx
that gives a small fixed answer on the model's Unix socket, run as a `command` model. Yardsticks in front of the same upstream:
nothing (wrk straight to it, over TCP), nginx with proxy_pass over kept connections and one worker, and, given their binaries,
llama-swap and large-model-proxy. All are up all the time and measured in turns, so that noise hits all alike; figures are
medians of the rounds, ratios are taken in each round. wrk, the upstream and the proxy share the machine's cores.

Streams: their source and their sink are one small C program (streams.c), compiled here, which writes and checks every event.
The proxy has a core for itself, source and sink share another one. Events come spread evenly, or in steps as those of an
engine's batch. Added latency is a percentile through the proxy less that of the same sink on the source itself, in the same
round; by how much the source was late is told, and no part of it. `waited` is how long the proxy had work and no core: half a
percent of it, in one piece, is enough to make a p99 of 10 ms that is the machine's and not the proxy's. --realtime keeps most
of that away.

Needs wrk, nginx and gcc. Nothing is asserted but that every answer was right.
"""

import argparse
import itertools
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "integration"))

from figures import machine
from load import Load, median, wrk
from memory import usage
from streaming import EVENTS_PER_S, PATTERNS, Core, Seen, compile_streams, print_table, watch
from testbed import Installation
from yardsticks import streaming_nginx, upstream_conf, yardsticks

_API_PORT = 8000
_GATEWAY = "mmd-gateway.service"
_BENCH = "/usr/local/lib/mmd-bench"
_SIZE = 128 << 20
_CONNECTIONS = (1, 64)

_MODELS = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}
models:
  fixed: {{engine: command, gpus: 0, listen: unix, command: [/usr/sbin/nginx, -e, stderr, -c, {_BENCH}/upstream.conf]}}
  streams: {{engine: command, gpus: 0, listen: unix, command: [{_BENCH}/streams, source, "{{socket}}"]}}
"""


class Bench:
    """The installation with its two models."""

    def __init__(self, installation: Installation, arguments: argparse.Namespace, folder: Path) -> None:
        self.installation = installation
        self.arguments = arguments
        self.folder = folder
        socket_path = "/run/mmd-model/fixed@cpu/engine.sock"
        installation.write(f"{_BENCH}/upstream.conf", upstream_conf("/run/mmd-model/fixed@cpu", socket_path))
        self.streams_binary = compile_streams(folder)
        shutil.copy(self.streams_binary, installation.path(_BENCH))
        installation.configure(_MODELS)
        installation.ctl("start", "fixed", "streams")
        self.socket = installation.path(socket_path)

    @property
    def gateway(self) -> int:
        """Its process id as we see it."""
        inside = self.installation.show(_GATEWAY, "MainPID")
        return self._process(lambda process: f"NSpid:\t{process.name}\t{inside}\n" in (process / "status").read_text())

    @property
    def source(self) -> int:
        """The process id of the streams' source."""
        return self._process(lambda process: (process / "comm").read_text() == "streams\n")

    def _process(self, wanted: Callable[[Path], bool]) -> int:
        """The process of the testbed that is wanted."""
        root = Path(f"/proc/{self.installation.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "ns/pid").readlink() == root and wanted(process):
                    return int(process.name)
        raise AssertionError("the process does not run")

    def requests(self) -> dict[str, dict[str, Load]]:
        """By kind of load and by who answered."""
        arguments = self.arguments
        kinds = {f"{number} connections": (number, False) for number in _CONNECTIONS} | {"64, new each": (64, True)}
        rounds: dict[str, dict[str, list[Load]]] = {kind: {} for kind in kinds}
        with yardsticks(self.socket, arguments.llama_swap, arguments.large_model_proxy) as found:
            targets = {"mmd": (_API_PORT, self.gateway), **found}
            for _ in range(arguments.rounds):
                for kind, (connections, close) in kinds.items():
                    for name, (port, pid) in targets.items():
                        load = wrk(
                            port,
                            connections=connections,
                            seconds=arguments.seconds,
                            pids=[pid] if pid else [],
                            folder=self.folder,
                            close=close,
                        )
                        rounds[kind].setdefault(name, []).append(load)
            rss = {name: usage(Path("/proc"), [pid]).rss_mib for name, (_, pid) in targets.items() if pid and name != "nginx"}
        self._print_requests(rounds, rss)
        return {kind: {name: median(loads) for name, loads in found.items()} for kind, found in rounds.items()}

    def _print_requests(self, rounds: dict[str, dict[str, list[Load]]], rss: dict[str, float]) -> None:
        for kind, found in rounds.items():
            print(f"\n{kind:18}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'cpu us/req':>12}{'mmd is':>9}")
            for name, loads in found.items():
                here = median(loads)
                pairs = zip(found["mmd"], loads, strict=True)
                ratio = statistics.median(mine.requests_per_s / other.requests_per_s for mine, other in pairs)
                figures = f"{here.requests_per_s:10.0f}{here.p50_ms:9.3f}{here.p99_ms:9.3f}{here.cpu_us:12.1f}{ratio:8.2f}x"
                print(f"  {name:16}{figures}")
        print("\nmemory after load (RSS): " + ", ".join(f"{name} {mib:.1f} MiB" for name, mib in rss.items()))

    def streams(self) -> None:
        """Latency of events straight from their source, through the gateway, and through nginx."""
        arguments = self.arguments
        cores = sorted(os.sched_getaffinity(0))
        theirs, ours = (Core(number, arguments.realtime) for number in (cores[0], cores[1 % len(cores)]))
        socket_path = self.installation.path("/run/mmd-model/streams@cpu/engine.sock")
        gateway = self.gateway
        with ExitStack() as stack:
            port, nginx = stack.enter_context(streaming_nginx(socket_path))
            stack.enter_context(theirs.holds(gateway, nginx))
            stack.enter_context(ours.holds(self.source))
            targets: dict[str, tuple[str, list[int]]] = {
                "direct": (f"unix:{socket_path}", []),
                "mmd": (str(_API_PORT), [gateway]),
                "nginx": (str(port), [nginx]),
            }
            where = f"proxy on core {theirs.number}, source and sink on core {ours.number}"
            print(f"\n{where}{', real-time' if arguments.realtime else ''}; medians of {arguments.rounds}")
            for number, (pattern, batch) in itertools.product(arguments.streams, PATTERNS.items()):
                rounds: dict[str, list[Seen]] = {name: [] for name in targets}
                for _ in range(arguments.rounds):
                    for name, (endpoint, pids) in targets.items():
                        load = {"streams": number, "batch": batch, "seconds": arguments.seconds}
                        rounds[name].append(watch(self.streams_binary, endpoint, **load, core=ours, pids=pids))
                print(f"\n{number} streams of {EVENTS_PER_S} events a second, {pattern}")
                print_table(rounds)

    def slow_reader(self) -> float:
        """How much the gateway grows, in MiB, while a client reads 128 MiB slowly."""
        body = json.dumps({"model": "streams", "max_tokens": _SIZE}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        before = most = usage(Path("/proc"), [self.gateway]).rss_mib
        with socket.create_connection(("127.0.0.1", _API_PORT), timeout=30) as client:
            client.sendall(head.encode() + body)
            read = 0
            while piece := client.recv(1 << 20):
                if read < 32 << 20:
                    time.sleep(0.02)
                    most = max(most, usage(Path("/proc"), [self.gateway]).rss_mib)
                read += len(piece)
        if read < _SIZE:
            raise AssertionError(f"{read} bytes of {_SIZE}")
        print(f"\n128 MiB to a slow reader: the gateway grew by {most - before:.1f} MiB")
        return most - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/run --bench relay", description="The relay benchmark.")
    parser.add_argument("--seconds", type=int, default=3, help="each run is measured (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns (default: 5)")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[500, 1000], metavar="N", help="event streams at once (default: 500 1000)"
    )
    parser.add_argument("--realtime", action="store_true", help="streams: keep the machine's other work off both cores")
    parser.add_argument("--llama-swap", type=Path, metavar="BINARY", help="measure llama-swap as well")
    parser.add_argument("--large-model-proxy", type=Path, metavar="BINARY", help="measure large-model-proxy as well")
    parser.add_argument("--only", choices=("requests", "streams", "slow"), help="one part")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder, Installation() as installation, installation.network():
        bench = Bench(installation, arguments, Path(folder))
        if arguments.only in (None, "requests"):
            bench.requests()
        if arguments.only in (None, "streams"):
            bench.streams()
        if arguments.only in (None, "slow"):
            bench.slow_reader()
        installation.stop_all()


if __name__ == "__main__":
    main()
