"""What an engine's start depends on that is known only now: its port, its devices, their memory; and the report's file."""

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from mmd.errors import MmdError
from mmd.names import Placement, is_slice
from mmd.report import REPORT_FILE, Report
from mmd.runner.options import Options
from mmd.runner.process import signal_group, spawn

__all__ = ["choose_port", "engine_environment", "expand", "macros", "visible_devices", "write_report"]

_OURS = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "CREDENTIALS_DIRECTORY",
)
"""Between systemd and the runner only (sd_notify(3), sd_listen_fds(3), systemd.exec(5)): an engine that used them would
speak for the runner."""

_PROBE_TIMEOUT_S = 15.0
"""The first process that opens the driver may have to initialise it, some seconds for each GPU."""

_REPORT_MODE = 0o640  # the gateway reads it as a member of the group


def choose_port(wanted: int | None) -> int:
    """A free TCP port of loopback, or `wanted` if it is free; MmdError when it is taken, since the health check would then be
    answered by whoever has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise MmdError(f"port {wanted} is not free: {error.strerror}", hint=f"ss -ltnp sport = :{wanted}") from error
        port: int = probe.getsockname()[1]
    return port


def visible_devices(placement: Placement) -> str:
    """The placement's GPUs as CUDA knows them: by index, but a slice (MIG) by its UUID. MmdError when that cannot be read."""
    return ",".join(_uuid(gpu) if is_slice(gpu) else str(gpu) for gpu in placement.gpus)


def engine_environment(environment: Mapping[str, str], devices: str) -> dict[str, str]:
    """The engine's variables: the unit's, and which GPUs it may see. CUDA's own order (fastest first) differs from NVML's."""
    kept = {name: value for name, value in environment.items() if name not in _OURS}
    return kept | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": devices}


def macros(options: Options, devices: str, port: int | None, command: Iterable[str]) -> dict[str, str]:
    """What stands for `{port}`, `{gpus}` and so on. The GPUs are asked for their memory only if `command` needs that."""
    found = {
        "{gpus}": devices,
        "{socket}": str(options.socket),
        "{model}": options.model,
        "{id}": options.id,
    }
    if port is not None:
        found["{port}"] = str(port)
    if any("{vram_fraction}" in word for word in command):
        found["{vram_fraction}"] = _vram_fraction(options)
    return found


def expand(words: Sequence[str], values: Mapping[str, str], *, only: Iterable[str] | None = None) -> tuple[str, ...]:
    """`words` with the macros (or those of `only`) replaced. Not str.format: other braces are the user's, such as JSON."""
    used = values if only is None else {name: values[name] for name in only if name in values}

    def one(word: str) -> str:
        for macro, value in used.items():
            word = word.replace(macro, value)
        return word

    return tuple(map(one, words))


def write_report(options: Options, report: Report) -> None:
    """Replace DIRECTORY/report.json in one step."""
    path = options.directory / REPORT_FILE
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _REPORT_MODE), "w") as file:
        os.fchmod(file.fileno(), _REPORT_MODE)
        file.write(report.to_json())
    new.rename(path)


def _vram_fraction(options: Options) -> str:
    if options.vram_bytes is None:
        raise MmdError("{vram_fraction} needs --vram")
    known = options.gpu_memory_bytes
    if any(gpu not in known for gpu in options.placement.gpus):
        known = {index: gpu.total_bytes for index, gpu in _measured().items()}
    missing = [gpu for gpu in options.placement.gpus if gpu not in known]
    if missing or not options.placement.gpus:
        raise MmdError(f"the memory of GPU {', '.join(map(str, missing)) or '(none)'} is not known", hint="nvidia-smi")
    return f"{min(1.0, options.vram_bytes / min(known[gpu] for gpu in options.placement.gpus)):.4f}"


def _uuid(gpu: int) -> str:
    known = _measured()
    if gpu not in known:
        raise MmdError(f"there is no GPU {gpu}: what it was divided into has changed", hint="nvidia-smi -L")
    return known[gpu].uuid


class _Gpu(NamedTuple):
    uuid: str
    total_bytes: int


@cache
def _measured() -> dict[int, _Gpu]:
    """By index, from NVML in a process of its own: neither pynvml nor the driver's library stays in the runner."""
    reading, writing = os.pipe()
    pid = spawn((sys.executable, "-I", "-m", "mmd.gpu.probe", "--once"), os.environ, output=writing)
    os.close(writing)
    text = b""
    deadline_s = time.monotonic() + _PROBE_TIMEOUT_S
    while select.select([reading], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
        data = os.read(reading, 65536)
        if not data:
            break
        text += data
    os.close(reading)
    signal_group(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return _parse_probe(text.decode(errors="replace"))


def _parse_probe(text: str) -> dict[int, _Gpu]:
    """The last line is the answer; a driver may have said something before it."""
    try:
        answer = json.loads(text.strip().rpartition("\n")[2])
        if "error" in answer:
            raise MmdError(f"the GPUs cannot be read: {answer['error']}", hint="nvidia-smi")
        return {gpu["index"]: _Gpu(gpu["uuid"], gpu["total_bytes"]) for gpu in answer["gpus"]}
    except (ValueError, KeyError, TypeError) as error:
        raise MmdError(f"the GPUs cannot be read: the probe said {text!r}", hint="nvidia-smi") from error
