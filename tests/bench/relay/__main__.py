"""The relay benchmark: what the gateway costs between a client and an engine that is ready. `tests/run --bench relay`

The gateway is the real one, installed in a private systemd (root), with its scheduler, polkit and all; its engine is an nginx
that gives a small fixed answer on the model's Unix socket, run as a `command` model. Yardsticks in front of the same upstream:
nothing (wrk straight to it, over TCP), nginx with proxy_pass over kept connections and one worker, and, given their binaries,
llama-swap and large-model-proxy. All are up all the time and measured in turns, so that noise hits all alike; figures are
medians of the rounds, ratios are taken in each round. wrk, the upstream and the proxy share the machine's cores.

Streams: their source and their sink are programs of this benchmark, which need CPU time as well: on two cores the three
compete. Added latency is the gateway's percentile less that of the same sink on the source itself.

Needs wrk and nginx. Nothing is asserted but that every answer was right.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "integration"))

from figures import machine
from load import Load, cpu_s, median, wrk
from memory import usage
from testbed import Installation
from yardsticks import upstream_conf, yardsticks

_API_PORT = 8000
_GATEWAY = "mmd-gateway.service"
_BENCH = "/usr/local/lib/mmd-bench"
_SIZE = 128 << 20
_CONNECTIONS = (1, 64)

_MODELS = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}
models:
  fixed: {{engine: command, gpus: 0, listen: unix, command: [/usr/sbin/nginx, -e, stderr, -c, {_BENCH}/upstream.conf]}}
  streams: {{engine: command, gpus: 0, listen: unix,
    command: [/usr/lib/mmd/bin/python, {_BENCH}/upstream.py, "{{socket}}"]}}
"""


class Bench:
    """The installation with its two models."""

    def __init__(self, installation: Installation, arguments: argparse.Namespace, folder: Path) -> None:
        self.installation = installation
        self.arguments = arguments
        self.folder = folder
        socket_path = "/run/mmd-model/fixed@cpu/engine.sock"
        installation.write(f"{_BENCH}/upstream.conf", upstream_conf("/run/mmd-model/fixed@cpu", socket_path))
        installation.write(f"{_BENCH}/upstream.py", Path(__file__).with_name("upstream.py").read_text())
        installation.configure(_MODELS)
        installation.ctl("start", "fixed", "streams")
        self.socket = installation.path(socket_path)

    @property
    def gateway(self) -> int:
        """Its process id as we see it."""
        inside, root = self.installation.show(_GATEWAY, "MainPID"), Path(f"/proc/{self.installation.pid}/ns/pid").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                mine = (process / "ns/pid").readlink() == root
                if mine and f"NSpid:\t{process.name}\t{inside}\n" in (process / "status").read_text():
                    return int(process.name)
        raise AssertionError("the gateway does not run")

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

    def streams(self) -> dict[str, dict[str, float]]:
        """Latency of events straight from their source, and through the gateway."""
        source = self.installation.path("/run/mmd-model/streams@cpu/engine.sock")
        found = {}
        number, events = self.arguments.streams, 50 * self.arguments.seconds * 2
        print(f"\n{number} streams of 50 events a second")
        for name, endpoint in (("direct", f"unix:{source}"), ("mmd", f"127.0.0.1:{_API_PORT}")):
            before, begun = cpu_s([self.gateway]), time.monotonic()
            argv = [sys.executable, str(Path(__file__).with_name("sink.py")), endpoint, "streams", str(number), str(events)]
            sink = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
            time.sleep(self.arguments.seconds)
            rss_mib = usage(Path("/proc"), [self.gateway]).rss_mib
            seen = json.loads(sink.communicate()[0])
            if seen["events"] != seen["expected"]:
                raise AssertionError(f"{name}: {seen['events']} events of {seen['expected']}")
            cores = (cpu_s([self.gateway]) - before) / (time.monotonic() - begun)
            found[name] = {"p50_ms": seen["p50"], "p99_ms": seen["p99"], "cores": cores, "rss_mib": rss_mib}
            print(
                f"  {name:8} p50 {seen['p50']:.2f} ms, p99 {seen['p99']:.2f} ms, gateway {cores:.2f} cores, {rss_mib:.1f} MiB"
            )
        added = {share: found["mmd"][share] - found["direct"][share] for share in ("p50_ms", "p99_ms")}
        print(f"  added    p50 {added['p50_ms']:.2f} ms, p99 {added['p99_ms']:.2f} ms")
        return found

    def slow_reader(self) -> float:
        """How much the gateway grows, in MiB, while a client reads 128 MiB slowly."""
        body = json.dumps({"model": "streams", "max_tokens": _SIZE}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
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
    parser.add_argument("--seconds", type=int, default=3, help="each run of wrk takes (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="in which all take turns (default: 5)")
    parser.add_argument("--streams", type=int, default=1000, help="event streams at once (default: 1000)")
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
