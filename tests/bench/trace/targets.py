"""What a trace is sent to: mmd in a private systemd, or an endpoint that somebody else runs."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from testbed import Installation
from workload import MODELS

__all__ = ["MODEL_NAMES", "SIM", "VRAM_BYTES", "Counts", "Endpoint", "Mmd", "Policy", "Simulated", "Target"]

MODEL_NAMES = tuple(f"model-{rank}" for rank in range(1, MODELS + 1))
VRAM_BYTES = 16 << 30
"""Of each model."""

SIM = Path(sys.executable).with_name("mmd-sim")

_LOAD_S = 5.2
_WAKE_S = 0.57
_SLEEP_S = 0.3
_TOKENS_PER_S = 50.0
_MOST_TOKENS_PER_S = 100.0
"""Faster ones would measure the machine: hot-cold at scale 0.1 is 3,200 chunks a second, each through three processes."""

_HOST_RAM = "256GiB"  # enough for every model to sleep at level 1, whatever this machine has


@dataclass(frozen=True, slots=True)
class Simulated:
    """The GPU, and how the engines behave, in real seconds: times at scale 1 multiplied by the scale."""

    gpu_bytes: int
    scale: float
    load_s: float
    """What the engine is told. Its interpreter's start is part of the load time, so it is told that much less."""
    wake_s: float
    sleep_s: float
    tokens_per_s: float

    @classmethod
    def at(cls, scale: float, *, gpu_bytes: int) -> "Simulated":
        load_s = max(0.0, _LOAD_S * scale - _startup_s())
        return cls(gpu_bytes, scale, load_s, _WAKE_S * scale, _SLEEP_S * scale, min(_TOKENS_PER_S / scale, _MOST_TOKENS_PER_S))


def _startup_s() -> float:
    """How long mmd-sim takes to come to its own code, at best."""
    return min(_elapsed_s(SIM, "--help") for _ in range(5))


def _elapsed_s(*argv: str | Path) -> float:
    begun = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


@dataclass(frozen=True, slots=True)
class Counts:
    """What the engines did during a trace."""

    starts: int
    wakes: int
    out_of_memory: int
    """Engines that died of it."""

    @property
    def swaps(self) -> int:
        return self.starts + self.wakes


class Target(Protocol):
    """`serving` is entered once for each trace, with everything stopped, and left after it."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    @property
    def models(self) -> Sequence[str]:
        """Names at the endpoint, by rank."""

    def serving(self) -> AbstractContextManager[Callable[[], Counts | None]]:
        """The context's value tells the counts since its begin; None: nobody knows them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI API that runs already, its models in whatever state they are."""

    name: str
    url: str
    models: Sequence[str]

    @contextmanager
    def serving(self) -> Iterator[Callable[[], Counts | None]]:
        yield lambda: None


@dataclass(frozen=True, slots=True)
class Policy:
    """mmd's settings that matter here; seconds at scale 1."""

    evict: str
    sleep: bool
    max_wait_s: float
    min_residency_s: float


class Mmd:
    """mmd as packaging/up installs it, in a private systemd."""

    url = Installation.api
    models = MODEL_NAMES

    def __init__(self, installation: Installation, simulated: Simulated, policy: Policy) -> None:
        self.name = f"mmd, {policy.evict}" if policy.sleep else f"mmd, {policy.evict}, no sleep"
        self._installation = installation
        self._configuration = _configuration(simulated, policy)

    @contextmanager
    def serving(self) -> Iterator[Callable[[], Counts]]:
        self._installation.configure(self._configuration)
        before = self._counts()

        def counts() -> Counts:
            return Counts(**{key: count - asdict(before)[key] for key, count in asdict(self._counts()).items()})

        try:
            yield counts
        finally:
            self._installation.stop_all()

    def _counts(self) -> Counts:
        """Since the installation, from the journal."""
        gateway = self._installation.journal("-u", "mmd-gateway").splitlines()
        actions = Counter(line.partition(" mmd-model-")[0] for line in gateway)
        engines = self._installation.journal("MMD_ROLE=model")
        return Counts(actions["start"], actions["wake"], engines.count("OutOfMemoryError"))


def _configuration(simulated: Simulated, policy: Policy) -> str:
    max_wait, min_residency = _ms(policy.max_wait_s * simulated.scale), _ms(policy.min_residency_s * simulated.scale)
    return f"""
gpus: {{provider: sim, devices: [{{memory: {simulated.gpu_bytes >> 30}GiB}}]}}
resources: {{ram: {_HOST_RAM}}}
policy: {{evict: {policy.evict}, max_wait: {max_wait}, min_residency: {min_residency}}}
defaults:
  engine: sim
  vram: {VRAM_BYTES >> 30}GiB
  sleep: {{level: {1 if policy.sleep else "off"}}}
  sim: {{load_time: {_ms(simulated.load_s)}, wake_time: {_ms(simulated.wake_s)}, tokens_per_second: {simulated.tokens_per_s:g}}}
  args: ["--sleep-time", "{simulated.sleep_s:.3f}"]
models: {{{", ".join(f"{name}: {{}}" for name in MODEL_NAMES)}}}
"""


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"
