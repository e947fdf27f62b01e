"""GPU memory as the gateway measures it: samples for the scheduler, and proof that memory which should come back did."""

import asyncio
import logging
from collections.abc import Callable

from mmd.config import Model
from mmd.errors import MmdError
from mmd.gpu import GpuMemory, GpuProvider
from mmd.names import Placement
from mmd.policy.events import GpuSample, Sampled
from mmd.sizes import vram_bytes

__all__ = ["Memory"]

_log = logging.getLogger(__name__)

# How long freed memory may take to show, and how often we look: drivers release within some hundred milliseconds; Ollama waits
# for at most 5 s as well (scheduling.md).
_SETTLE_S = 5.0
_POLL_S = 0.05
_FALL_S = 1.0
_SAMPLE_INTERVAL_S = 2.0


class Memory:
    """Samples a provider. `on_sample` is told of every sample."""

    def __init__(self, provider: GpuProvider, on_sample: Callable[[Sampled], None]) -> None:
        self._provider = provider
        self._on_sample = on_sample
        self.gpus: tuple[GpuMemory, ...] = ()
        self.problem = ""
        """Why the last sample failed; "" when it did not."""

    async def sample(self) -> None:
        """Take a sample; one that fails leaves the last one in force."""
        try:
            self.gpus = await self._provider.sample()
        except MmdError as error:
            if str(error) != self.problem:
                _log.warning("GPU memory cannot be measured: %s", error)
            self.problem = str(error)
            return
        self.problem = ""
        self._on_sample(Sampled(tuple(GpuSample(g.index, g.total_bytes, g.used_bytes, g.uuid) for g in self.gpus)))

    async def watch(self) -> None:
        """Sample for ever. Where nothing can be measured the first sample has said it all."""
        while True:
            await asyncio.sleep(_SAMPLE_INTERVAL_S)
            if self._provider.measures:
                await self.sample()

    def used(self, placement: Placement) -> int | None:
        """Bytes in use on the placement's GPUs in the last sample, everybody's; None when not measured."""
        used = [gpu.used_bytes for gpu in self.gpus if gpu.index in placement.gpus and gpu.used_bytes is not None]
        return sum(used) if used and len(used) == len(placement.gpus) else None

    async def measure(self, placement: Placement) -> int | None:
        """`used`, of a sample taken now."""
        if not self._provider.measures or not placement.gpus:
            return None
        await self.sample()
        return self.used(placement)

    @staticmethod
    def awake_bytes(model: Model) -> int:
        """What a model is reckoned to hold per GPU while awake."""
        return vram_bytes(model)

    async def wait_freed(self, placement: Placement, before: int, expected_per_gpu: int) -> int:
        """Bytes freed per GPU since `before`: as soon as they are what is expected, or what there is after `_SETTLE_S`."""
        freed = 0
        for _ in range(round(_SETTLE_S / _POLL_S)):
            now = await self.measure(placement)
            freed = 0 if now is None else (before - now) // len(placement.gpus)
            if freed >= expected_per_gpu:
                break
            await asyncio.sleep(_POLL_S)
        return freed

    async def settle(self, placement: Placement, before: int | None) -> None:
        """After a stop: wait until use has fallen and falls no more, so that the next start meets the memory it was promised.

        A unit that was stopped while it was still loading may have held nothing: `_FALL_S` is all the patience it gets.
        """
        last = before
        for poll in range(round(_SETTLE_S / _POLL_S)):
            now = await self.measure(placement)
            if now is None or before is None or last is None:
                return
            fallen = now < before or poll * _POLL_S >= _FALL_S
            if fallen and now >= last:
                return
            last = now
            await asyncio.sleep(_POLL_S)

    async def replace(self, provider: GpuProvider) -> None:
        """Measure by another provider from now on."""
        old, self._provider = self._provider, provider
        await old.close()
        await self.sample()

    async def close(self) -> None:
        await self._provider.close()
