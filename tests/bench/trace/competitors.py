"""Other people's programs over the same simulated engines, configured to do the same.

Written for, and run with, llama-swap 0bdb372 (22 August 2026) and large-model-proxy d07fa21 (4 August 2026); what is not set
is left at its default. Their engines listen on TCP ports and keep their memory in one ledger, as mmd's do, so that a swap that
comes too early kills the engine.
"""

import json
import os
import shlex
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path

from targets import MODEL_NAMES, SIM, VRAM_BYTES, Counts, Simulated

__all__ = ["Competitor", "LargeModelProxy", "LlamaSwap"]

_PORT = 9100
_FIRST_ENGINE_PORT = 9200
"""Nobody else is in the testbed's network."""

_STOPS_WITHIN_S = 20.0
_UNLIMITED = 100_000
"""Requests at a time, or seconds: more than a trace has."""


class Competitor(ABC):
    """A proxy that starts and stops engines itself. It is started anew for each trace."""

    name: str
    url = f"http://127.0.0.1:{_PORT}"
    models: Sequence[str] = MODEL_NAMES

    def __init__(self, binary: Path, simulated: Simulated) -> None:
        self._binary = binary.resolve()
        self._simulated = simulated

    @abstractmethod
    def command(self, engine: Path, folder: Path) -> list[str]:
        """Writes the configuration into `folder`; how the proxy is started."""

    @contextmanager
    def serving(self) -> Iterator[Callable[[], Counts]]:
        with tempfile.TemporaryDirectory(prefix="mmd-trace-") as name:
            folder = Path(name)
            starts, errors = folder / "starts", folder / "errors"
            engine = self._engine(folder)
            with (folder / "log").open("wb") as log:
                command = self.command(engine, folder)
                proxy = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
            try:
                yield lambda: Counts(len(_lines(starts)), 0, sum("OutOfMemoryError" in line for line in _lines(errors)))
            finally:
                _stop(proxy)
                _end_orphans(folder, _lines(starts))

    def _engine(self, folder: Path) -> Path:
        """A program that becomes mmd-sim, and leaves its process id."""
        path, simulated = folder / "engine", self._simulated
        options = {
            "--load-time": f"{simulated.load_s:.3f}",
            "--tokens-per-second": f"{simulated.tokens_per_s:g}",
            "--vram": str(VRAM_BYTES),
            "--gpus": "0",
            "--gpu-memory": f"0={simulated.gpu_bytes}",
            "--sim-dir": str(folder / "ledger"),
        }
        command = shlex.join([str(SIM), *(word for option in options.items() for word in option)])
        path.write_text(f'#!/bin/sh\necho $$ >>{folder}/starts\nexec {command} "$@" 2>>{folder}/errors\n')
        path.chmod(0o755)
        return path


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _stop(proxy: subprocess.Popen[bytes]) -> None:
    proxy.terminate()
    try:
        proxy.wait(_STOPS_WITHIN_S)
    except subprocess.TimeoutExpired:
        proxy.kill()
        proxy.wait()


def _end_orphans(folder: Path, pids: Sequence[str]) -> None:
    """End the engines that outlived their proxy; a process id may be somebody else's by now, the folder's name is ours."""
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            if os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)


class LlamaSwap(Competitor):
    """One model at a time, its default; where more fit (--gpu-gib) it is told which may be together, knowing no memory.

    It asks an engine for its health 0.25 s after the start and then once a second, which cannot be set. So only scale 1 is fair
    to it: at 0.1 a start takes 1.25 s instead of 0.52 s.
    """

    name = "llama-swap"

    def command(self, engine: Path, folder: Path) -> list[str]:
        models = {
            model: {
                "cmd": f"{engine} --model {model} --port ${{PORT}}",
                "proxy": "http://127.0.0.1:${PORT}",
                # Its default answers the eleventh request with 429.
                "concurrencyLimit": _UNLIMITED,
            }
            for model in self.models
        }
        configuration = folder / "config.yaml"
        configuration.write_text(json.dumps({"startPort": _FIRST_ENGINE_PORT, "models": models, **self._routing()}))
        return [str(self._binary), "--config", str(configuration), "--listen", f"127.0.0.1:{_PORT}"]

    def _routing(self) -> dict[str, object]:
        fitting = self._simulated.gpu_bytes // VRAM_BYTES
        if fitting == 1:
            return {}
        sets = {f"set{number}": " & ".join(together) for number, together in enumerate(combinations(self.models, fitting))}
        return {"routing": {"router": {"use": "matrix", "settings": {"matrix": {"sets": sets}}}}}


class LargeModelProxy(Competitor):
    """The least recently used leaves; memory is a resource called VRAM, in MiB.

    It has no health check, as vLLM has none in its README: like vLLM the engine listens only once it has loaded, and until then
    the proxy tries to connect every 0.1 s. A check is a command, so one as often as mmd asks would be a load of its own.
    """

    name = "large-model-proxy"

    def command(self, engine: Path, folder: Path) -> list[str]:
        configuration = folder / "config.json"
        services = [self._service(engine, model, _FIRST_ENGINE_PORT + rank) for rank, model in enumerate(self.models)]
        configuration.write_text(
            json.dumps(
                {
                    "OpenAiApi": {"ListenPort": str(_PORT)},
                    "MaxTimeToWaitForServiceToCloseConnectionBeforeGivingUpSeconds": _UNLIMITED,
                    "ShutDownAfterInactivitySeconds": _UNLIMITED,
                    "ResourcesAvailable": {"VRAM": self._simulated.gpu_bytes >> 20},
                    "Services": services,
                }
            )
        )
        return [str(self._binary), "-c", str(configuration)]

    def _service(self, engine: Path, model: str, port: int) -> dict[str, object]:
        return {
            "Name": model,
            "OpenAiApi": True,
            "ProxyTargetHost": "127.0.0.1",
            "ProxyTargetPort": str(port),
            "Command": str(engine),
            "Args": f"--model {model} --port {port}",
            "ResourceRequirements": {"VRAM": VRAM_BYTES >> 20},
        }
