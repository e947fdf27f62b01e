"""The trace benchmark: how long clients wait for their first token while models share a GPU. `tests/run --bench trace`

Four models of 16 GiB share a simulated GPU of 24 GiB, so one is awake at a time. An engine loads in 5.2 s, wakes in 0.57 s,
falls asleep in 0.3 s and decodes 50 tokens/s. The traces, seeded: requests at random with Zipf popularity, 0.6 and 2 a second;
bursts of about 5 to one model every 8 s; a hot model with 4 requests a second and a cold one with one every 15 s. They are sent
open loop and streamed. Everything happens 1/scale times as fast, mmd's own limits (max_wait, min_residency) included, and
figures are given in seconds at scale 1: at 0.1, one second in the table was 0.1 s on the clock. What does not scale is the
programs' own work (starting processes, decisions, relaying), so a smaller scale is unkind to all of them; and answers have
fewer tokens rather than much faster ones, because the machine would be the limit: at 0.1 a token takes 0.1 s of the table.

Where one model is awake at a time there is only one that can leave, so lru and min_loss do the same; not so with --gpu-gib 40.

Every trace begins with all models stopped. Without --endpoint, mmd is measured, installed in a private systemd (root), and on
the same traces the other programs whose binaries are given. Nothing is asserted; the exit status is 0 however slow anybody was.
"""

import argparse
import ipaddress
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "integration"))

from competitors import LargeModelProxy, LlamaSwap
from replay import replay, wait_until_answers
from results import Result, as_json, as_table, ratios
from targets import MODEL_NAMES, Endpoint, Mmd, Policy, Simulated, Target
from testbed import Installation
from workload import MODELS, NAMES, Trace, make_trace

_VARIANTS = (("min_loss", True), ("lru", True), ("min_loss", False))
_MOST_REQUESTS = 10_000
_LATE_S = 0.5
"""At scale 1. A load generator that fell behind by more is part of what was measured."""


def main() -> None:
    arguments = _arguments()
    simulated = Simulated.at(arguments.scale, gpu_bytes=arguments.gpu_gib << 30)
    traces = [_trace(name, arguments) for name in arguments.traces]
    with ExitStack() as stack:
        targets = _targets(arguments, simulated, stack)
        results = [_measure(target, trace, simulated) for target in targets for trace in traces]
    if arguments.json:
        print(json.dumps({"scale": arguments.scale, "cores": _cores(), "results": as_json(results)}, indent=2))
        return
    print(f"{_cores()} cores, scale {arguments.scale:g}, seed {arguments.seed}; times to the first token at scale 1\n")
    print(as_table(results))
    if len(targets) > 1:
        print(f"\n{ratios(results)}")


def _trace(name: str, arguments: argparse.Namespace) -> Trace:
    trace = make_trace(name, seed=arguments.seed, duration_s=arguments.duration, decode_s=arguments.decode)
    if len(trace.requests) > _MOST_REQUESTS:
        sys.exit(f"{name}: {len(trace.requests)} requests are more than {_MOST_REQUESTS}: choose a shorter --duration")
    return trace


def _measure(target: Target, trace: Trace, simulated: Simulated) -> Result:
    with target.serving() as counts:
        wait_until_answers(target.url)
        outcomes = replay(trace, target.url, target.models, scale=simulated.scale, tokens_per_s=simulated.tokens_per_s)
        result = Result(trace.name, target.name, counts(), tuple(outcomes))
    what = f"{trace.name}, {target.name}"
    print(f"{what}: mean {result.mean_s:.2f} s, max {result.percentile_s(100):.2f} s", file=sys.stderr)
    if result.late_s > _LATE_S:
        print(f"{what}: requests were sent up to {result.late_s:.2f} s late", file=sys.stderr)
    return result


def _targets(arguments: argparse.Namespace, simulated: Simulated, stack: ExitStack) -> list[Target]:
    if arguments.endpoint:
        return [Endpoint(arguments.endpoint, arguments.endpoint, arguments.models)]
    installation = stack.enter_context(Installation())
    stack.enter_context(installation.network())
    variants = _VARIANTS if arguments.compare else ((arguments.policy, not arguments.no_sleep),)
    policies = [Policy(evict, sleep, arguments.max_wait, arguments.min_residency) for evict, sleep in variants]
    targets: list[Target] = [Mmd(installation, simulated, policy) for policy in policies]
    if arguments.llama_swap:
        targets.append(LlamaSwap(arguments.llama_swap, simulated))
    if arguments.large_model_proxy:
        targets.append(LargeModelProxy(arguments.large_model_proxy, simulated))
    return targets


def _arguments() -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="trace", description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=_positive, default=0.1, help="real seconds per second (default: 0.1)")
    parser.add_argument("--duration", type=_positive, default=300.0, metavar="SECONDS", help="of a trace, at scale 1 (300)")
    parser.add_argument("--decode", type=_positive, default=8.0, metavar="SECONDS", help="mean length of an answer (8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--traces", nargs="+", choices=NAMES, default=NAMES, metavar="TRACE", help=", ".join(NAMES))
    parser.add_argument("--gpu-gib", type=int, default=24, metavar="GIB", help="memory of the GPU (24; at 40 two are awake)")
    parser.add_argument("--policy", choices=("min_loss", "lru"), default="min_loss", help="mmd's policy.evict")
    parser.add_argument("--no-sleep", action="store_true", help="mmd stops victims (sleep.level: off)")
    parser.add_argument("--max-wait", type=_positive, default=60.0, metavar="SECONDS", help="mmd's policy.max_wait (60)")
    parser.add_argument("--min-residency", type=float, default=10.0, metavar="SECONDS", help="mmd's policy.min_residency (10)")
    parser.add_argument("--compare", action="store_true", help="mmd with min_loss, with lru, and without sleep, and the ratios")
    parser.add_argument("--llama-swap", type=Path, metavar="BINARY", help="measure it as well")
    parser.add_argument("--large-model-proxy", type=Path, metavar="BINARY", help="measure it as well")
    parser.add_argument("--endpoint", type=_loopback, metavar="URL", help="only this one, on this machine")
    parser.add_argument(
        "--models", nargs=MODELS, default=MODEL_NAMES, metavar="NAME", help="the endpoint's, most popular first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead, with every request")
    return parser.parse_args()


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _loopback(text: str) -> str:
    """A load is sent to nobody else's machine."""
    host = urlsplit(text).hostname or ""
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise argparse.ArgumentTypeError(f"{text} is not on this machine")
    return text.rstrip("/").removesuffix("/v1")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
