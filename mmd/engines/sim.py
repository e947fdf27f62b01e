"""The embedded engine: `mmd-sim`, an OpenAI-compatible server without a model behind it (mmd.sim).

Its control API and its log are vLLM's, so that the gateway and the runner treat it as one.
"""

import re
from collections.abc import Mapping

from mmd.config import Model
from mmd.engines import vllm
from mmd.engines.base import CommandContext, HttpCall, ProgressPattern

__all__ = ["ENGINE", "RESIDUAL_SHARE", "SimEngine"]

RESIDUAL_SHARE = {1: 0.05, 2: 0.02}
"""The share of its memory that it keeps on each GPU while asleep, by level."""


class SimEngine:
    """See `mmd.engines.base.Engine`."""

    __slots__ = ()

    uses_socket: bool = True
    can_sleep: bool = True
    sleeping: HttpCall | None = vllm.ENGINE.sleeping

    @property
    def progress(self) -> tuple[ProgressPattern, ...]:
        return vllm.ENGINE.progress

    @property
    def out_of_memory(self) -> re.Pattern[str] | None:
        return vllm.ENGINE.out_of_memory

    def command(self, model: Model, context: CommandContext) -> tuple[str, ...]:
        memory = sorted(context.gpu_memory_bytes.items())
        return (
            f"{context.bin_dir}/mmd-sim",
            *("--socket", context.socket),
            *("--model", model.name),
            *("--load-time", str(model.sim.load_time_s)),
            *("--wake-time", str(model.sim.wake_time_s)),
            *("--tokens-per-second", str(model.sim.tokens_per_second)),
            *("--vram", str(model.vram_bytes or 0)),
            *("--gpus", "{gpus}"),
            *(word for index, total_bytes in memory for word in ("--gpu-memory", f"{index}={total_bytes}")),
            *("--sim-dir", context.sim_dir),
            *(word for name, path in model.lora.items() for word in ("--lora", f"{name}={path}")),
            *model.args,
        )

    def environment(self, model: Model, context: CommandContext) -> Mapping[str, str]:
        return {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}

    def warm_up(self, model: str) -> HttpCall | None:
        return vllm.ENGINE.warm_up(model)

    def sleep(self, level: int) -> tuple[HttpCall, ...]:
        return vllm.ENGINE.sleep(level)

    def wake(self, level: int) -> tuple[HttpCall, ...]:
        return vllm.ENGINE.wake(level)

    def residual_bytes(self, model: Model, level: int) -> int:
        return int((model.vram_bytes or 0) * RESIDUAL_SHARE[level]) if model.gpu_count else 0

    def host_bytes(self, model: Model, level: int) -> int:
        """Level 1 moves everything but the residual, as if all of it were weights."""
        return ((model.vram_bytes or 0) - self.residual_bytes(model, 1)) * model.gpu_count if level == 1 else 0


ENGINE = SimEngine()
