"""The command line of mmd-sim."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmd.scope import Scope

__all__ = ["Faults", "Options", "parse"]


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on purpose. The counts are of inference requests, the runner's warm-up among them."""

    exit_during_load: int | None = None
    never_healthy: bool = False
    silent_load: bool = False
    refuse_warm_up: bool = False
    die_after_requests: int | None = None
    stall_after_requests: int | None = None
    unhealthy_after_requests: int | None = None
    ignore_sigterm: bool = False
    sleep_fails: bool = False
    sleep_keeps_memory: bool = False
    sleep_leaks: int = 0
    wake_fails: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    model: str
    lora: dict[str, str]
    """The path of each adapter, by the name that clients send."""
    socket: Path | None
    port: int | None
    load_time_s: float
    wake_time_s: float
    sleep_time_s: float
    tokens_per_second: float
    vram_bytes: int
    gpus: tuple[int, ...]
    gpu_memory_bytes: dict[int, int]
    host_memory_bytes: int | None
    sim_dir: Path
    faults: Faults


def parse(argv: Sequence[str]) -> Options:
    """Options from arguments; exits with status 2 and a usage message when they are wrong (argparse)."""
    parser = _parser()
    raw = vars(parser.parse_args(argv))
    faults = Faults(**{name: raw.pop(name) for name in Faults.__dataclass_fields__})
    memory = dict(raw.pop("gpu_memory"))
    missing = [gpu for gpu in raw["gpus"] if gpu not in memory]
    if missing and raw["vram"]:
        parser.error(f"--gpu-memory is missing for GPU {', '.join(map(str, missing))}")
    if raw["socket"] is None and raw["port"] is None:
        parser.error("one of --socket and --port is needed")
    return Options(
        model=raw["model"],
        lora=dict(raw["lora"]),
        socket=raw["socket"],
        port=raw["port"],
        load_time_s=raw["load_time"],
        wake_time_s=raw["wake_time"],
        sleep_time_s=raw["sleep_time"],
        tokens_per_second=raw["tokens_per_second"],
        vram_bytes=raw["vram"],
        gpus=raw["gpus"],
        gpu_memory_bytes=memory,
        host_memory_bytes=raw["host_memory"],
        sim_dir=raw["sim_dir"],
        faults=faults,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmd-sim", description="The API of vLLM, OpenAI, Anthropic and llama.cpp without a model behind it."
    )
    parser.add_argument("--model", required=True, help="the name that clients send")
    parser.add_argument("--lora", type=_name_and_path, action="append", default=[], metavar="NAME=PATH", help="an adapter")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path, help="listen on this Unix socket")
    where.add_argument("--port", type=int, help="listen on this TCP port of 127.0.0.1")
    parser.add_argument("--load-time", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--wake-time", type=float, default=0.2, metavar="SECONDS")
    parser.add_argument("--sleep-time", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--tokens-per-second", type=float, default=200.0, metavar="N", help="of one request; 0 = at once")
    parser.add_argument("--vram", type=int, default=0, metavar="BYTES", help="to allocate on each GPU")
    parser.add_argument("--gpus", type=_indexes, default=(), metavar="INDEX,...", help="where; empty = the CPU")
    parser.add_argument("--gpu-memory", type=_index_and_bytes, action="append", default=[], metavar="INDEX=BYTES")
    parser.add_argument("--host-memory", type=int, metavar="BYTES", help="what all level 1 sleepers share; default: no limit")
    parser.add_argument("--sim-dir", type=Path, default=Scope.user().sim_dir, help="the ledger of simulated GPU memory")
    _add_faults(parser.add_argument_group("faults, for tests"))
    return parser


def _add_faults(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--exit-during-load", type=int, metavar="STATUS")
    group.add_argument("--never-healthy", action="store_true", help="serve, but answer health checks with 503")
    group.add_argument("--silent-load", action="store_true", help="log nothing while loading")
    group.add_argument("--refuse-warm-up", action="store_true", help="answer the first request with 500")
    group.add_argument("--die-after-requests", type=int, metavar="N", help="exit when one more request arrives")
    group.add_argument("--stall-after-requests", type=int, metavar="N", help="then answer nothing any more")
    group.add_argument("--unhealthy-after-requests", type=int, metavar="N", help="then answer health checks with 503")
    group.add_argument("--ignore-sigterm", action="store_true")
    group.add_argument("--sleep-fails", action="store_true", help="answer /sleep with 500")
    group.add_argument("--sleep-keeps-memory", action="store_true", help="answer /sleep with 200 and free nothing")
    group.add_argument(
        "--sleep-leaks", type=int, default=0, metavar="BYTES", help="each sleep keeps this much more than the last"
    )
    group.add_argument("--wake-fails", action="store_true", help="answer /wake_up with 500")


def _indexes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _index_and_bytes(text: str) -> tuple[int, int]:
    index, _, size = text.partition("=")
    return int(index), int(size)


def _name_and_path(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (found and name and path):
        raise ValueError(text)  # argparse makes its usage message of it
    return name, path
