"""The interface of an engine: immutable descriptions, no I/O."""

import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from mmd.config import Model

__all__ = ["CommandContext", "Engine", "HttpCall", "ProgressPattern"]


class CommandContext(NamedTuple):
    """What an engine's command line may depend on besides the model.

    `socket` holds systemd specifiers (`%i`) as the unit will; `{port}` and `{gpus}`, which are known only when the unit runs,
    stay in the arguments as macros and are expanded by the runner, as is `{vram_fraction}`: the model's vram divided by the
    memory of the smallest GPU of the placement, four decimals.
    """

    socket: str
    bin_dir: str
    """Where mmd's own programs are, such as /usr/lib/mmd/bin."""
    cache_dir: str
    """The unit's CacheDirectory."""
    sim_dir: str
    gpu_memory_bytes: Mapping[int, int]
    """Configured memory per GPU index (providers static and sim); empty when it is measured (nvml)."""


class HttpCall(NamedTuple):
    """One call of an engine's control API. Anything but status 200 within `timeout_s` is a failure."""

    method: str
    path: str
    body: Mapping[str, object] | None = None
    timeout_s: float = 60.0


class ProgressPattern(NamedTuple):
    """A log line that tells how far a start has come.

    The text is formatted with the match's groups (`"loading weights {0} %"`).
    """

    pattern: re.Pattern[str]
    text: str


class Engine(Protocol):
    @property
    def progress(self) -> tuple[ProgressPattern, ...]:
        """Log lines worth showing, tried in order."""

    @property
    def out_of_memory(self) -> re.Pattern[str] | None:
        """What a log line looks like when the engine ran out of GPU memory."""

    @property
    def uses_socket(self) -> bool:
        """Whether it listens on the unit's Unix socket (else on a TCP port of loopback). `command` asks the model."""

    @property
    def can_sleep(self) -> bool: ...

    def command(self, model: Model, context: CommandContext) -> tuple[str, ...]:
        """The engine's argument vector, the program first; macros as CommandContext says."""

    def environment(self, model: Model, context: CommandContext) -> Mapping[str, str]:
        """Variables that the unit sets, the model's own `env` over them."""

    def warm_up(self, model: str) -> HttpCall | None:
        """One cheap request after the first load, so that the first client does not pay for lazy set-up."""

    def sleep(self, level: int) -> tuple[HttpCall, ...]:
        """The calls, in order, that put an idle engine to sleep at `level` (1 or 2)."""

    def wake(self, level: int) -> tuple[HttpCall, ...]:
        """The calls, in order, that wake it from `level`; the level 2 sequence reloads the weights."""

    @property
    def sleeping(self) -> HttpCall | None:
        """The call that tells `{"is_sleeping": bool}`, or None when it cannot sleep."""

    def residual_bytes(self, model: Model, level: int) -> int:
        """A first guess, until measured, of the GPU memory that it holds per GPU while asleep at `level`."""

    def host_bytes(self, model: Model, level: int) -> int:
        """Host memory that it takes, for all of its GPUs together, while asleep at `level`, beyond what it takes awake."""
