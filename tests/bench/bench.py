"""Benchmarks of the paths that people wait for, on a private systemd with mmd installed: `tests/run --bench`.

usage: bench.py [--runs N] [--json]

Every figure is the median of several runs. Nothing is asserted: figures depend on the machine, which the table names.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from figures import Figure, as_json, as_table
from latency import chat_request, first_byte_ms, first_healthy_s, get_request, waiting_client
from memory import Usage, children, usage
from testbed import Installation

_MODELS = 100
_GENERATOR = "/usr/lib/systemd/system-generators/mmd-generator"
_PYTHON = "/usr/lib/mmd/bin/python"
_GATEWAY = "mmd-gateway.service"
_MODEL = "mmd-model-quick@0.service"
_REQUESTS = 1000

_SERVING = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
models:
  quick: {engine: sim, vram: 4GiB, sim: {load_time: 200ms, tokens_per_second: 100000}}
"""


def many_models(count: int) -> str:
    """A configuration as people have them: profiles, some keys per model, two engines."""
    lines = [
        "gpus: {provider: sim, devices: [{memory: 80GiB}, {memory: 80GiB}]}",
        "defaults: {idle: {sleep_after: 10min, stop_after: 2h}}",
        "profiles:",
        "  small: {vram: 8GiB}",
        "  large: {vram: 40GiB, env: {OMP_NUM_THREADS: 4}}",
        "models:",
    ]
    for number in range(count):
        lines += [
            f"  org/model-{number}:",
            f"    id: model-{number}",
            f"    profile: {'small' if number % 2 else 'large'}",
            f"    aliases: [alias-{number}]",
            f"    description: Model number {number}",
            "    engine: sim" if number % 3 == 0 else '    args: ["--max-model-len", "8192"]',
        ]
    return "\n".join(lines) + "\n"


def generator(installation: Installation, runs: int) -> Iterator[Figure]:
    """The installed generator, started as systemd does."""
    folder = "/run/bench"
    installation.write(f"{folder}/mmd.yaml", many_models(_MODELS))
    commands = {
        f"generator, {_MODELS} models": [_GENERATOR, "--config-dir", folder, "--output", "{out}"],
        "  of which the interpreter": [_PYTHON, "-ISB", "-c", "pass"],
    }
    for name, command in commands.items():
        script = Path(__file__).with_name("timed.py")
        samples = installation.run("/usr/bin/python3", script, str(runs), *command, timeout_s=300).stdout
        yield Figure(name, "ms", tuple(json.loads(samples)), 60 if command[0] == _GENERATOR else None)


def socket_to_first_byte(installation: Installation, runs: int) -> Iterator[Figure]:
    """A connection to the activated socket starts the gateway. The model of the chat runs already."""
    first_byte_ms(chat_request("quick"))
    for name, request in (("GET /v1/models", get_request("/v1/models")), ("chat, model ready", chat_request("quick"))):
        samples = []
        for _ in range(runs):
            installation.systemctl("stop", _GATEWAY)
            samples.append(first_byte_ms(request))
        yield Figure(f"socket to first byte: {name}", "ms", tuple(samples), 700)


def healthy_to_first_byte(installation: Installation, runs: int) -> Iterator[Figure]:
    """A client waits for a stopped model: the runner has to notice, warm up and report, the gateway to let the client in."""
    engine_socket = installation.path("/run/mmd-model/quick@0/engine.sock")
    samples = []
    for _ in range(runs):
        installation.ctl("stop", "quick")
        with waiting_client(chat_request("quick")) as came:
            healthy = first_healthy_s(engine_socket)
        samples.append((came[0] - healthy) * 1000)
    yield Figure("engine healthy to first byte", "ms", tuple(samples), 100)


def _brokers(installation: Installation) -> list[int]:
    """The processes that drive units for the gateway, each a unit of its own."""
    shown = installation.systemctl("show", "--property=MainPID", "--value", "mmd-unit-broker@*.service")
    return [int(pid) for pid in shown.split() if pid != "0"]


def memory(installation: Installation, runs: int) -> Iterator[Figure]:
    """After the first request and after many; the gateway with and without its unit broker; the runner without its engine."""
    proc = installation.path("/proc")
    states: dict[str, list[tuple[Usage, Usage]]] = {"started": [], f"after {_REQUESTS} requests": []}
    runners = []
    for _ in range(runs):
        installation.systemctl("restart", _GATEWAY, "mmd-model-quick@0.service")
        for name, requests in zip(states, (1, _REQUESTS), strict=True):
            for _ in range(requests):
                first_byte_ms(chat_request("quick"))
            gateway = int(installation.show(_GATEWAY, "MainPID"))
            pids = [gateway, *children(proc, gateway), *_brokers(installation)]
            states[name].append((usage(proc, [gateway]), usage(proc, pids)))
        runners.append(usage(proc, [int(installation.show(_MODEL, "MainPID"))]))
    for name, found in states.items():
        yield Figure(f"gateway, {name}: RSS", "MiB", tuple(alone.rss_mib for alone, _ in found), 60)
        yield Figure("  PSS", "MiB", tuple(alone.pss_mib for alone, _ in found))
        yield Figure("  RSS with its unit broker", "MiB", tuple(both.rss_mib for _, both in found))
        yield Figure("  PSS with its unit broker", "MiB", tuple(both.pss_mib for _, both in found))
    yield Figure("runner: RSS", "MiB", tuple(one.rss_mib for one in runners), 16)
    yield Figure("  PSS", "MiB", tuple(one.pss_mib for one in runners))


def main() -> None:
    parser = argparse.ArgumentParser(description="mmd's benchmarks; prints a table")
    parser.add_argument("--runs", type=int, default=9, help="runs per figure (default: 9; memory a third)")
    parser.add_argument("--json", action="store_true", help="print JSON instead, with all samples")
    arguments = parser.parse_args()
    with Installation() as installation, installation.network():
        figures = [*generator(installation, 2 * arguments.runs)]
        installation.configure(_SERVING)
        figures += socket_to_first_byte(installation, arguments.runs)
        figures += healthy_to_first_byte(installation, arguments.runs)
        figures += memory(installation, max(1, arguments.runs // 3))
        installation.stop_all()
    print(json.dumps(as_json(figures), indent=2) if arguments.json else as_table(figures))


if __name__ == "__main__":
    main()
