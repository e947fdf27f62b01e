"""GPU memory as the gateway measures it: samples for the scheduler, and proof that memory which should come back did."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Set

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
_STEADY_S = 0.5
_SAMPLE_INTERVAL_S = 2.0


class Memory:
    """Samples a provider, which `open_provider` opens when it is first needed and again after it could not be opened.

    `on_sample` is told of every sample. One that was taken while some unit's memory changed is not passed on: it may be older
    than what the scheduler has heard of that unit, and would look like memory that somebody else has taken.
    """

    def __init__(self, open_provider: Callable[[], Awaitable[GpuProvider]], on_sample: Callable[[Sampled], None]) -> None:
        self._open_provider = open_provider
        self._provider: GpuProvider | None = None
        self._on_sample = on_sample
        self._lock = asyncio.Lock()
        self._changes = 0
        self.gpus: tuple[GpuMemory, ...] = ()
        self.problem = ""
        """Why the GPUs cannot be read at present; "" when they can."""

    def changed(self) -> None:
        """Some unit's memory begins to change, or has done so."""
        self._changes += 1

    async def sample(self) -> bool:
        """Take a sample, and whether that worked; a failure leaves the last one in force."""
        changes = self._changes
        try:
            async with self._lock:
                if self._provider is None:
                    self._provider = await self._open_provider()
                self.gpus = await self._provider.sample()
        except MmdError as error:
            if str(error) != self.problem:
                _log.warning("the GPUs cannot be read: %s", error)
            self.problem = str(error)
            self._on_sample(Sampled((), self.problem))
            return False
        self.problem = ""
        if changes == self._changes:
            self._on_sample(Sampled(tuple(GpuSample(g.index, g.total_bytes, g.used_bytes, g.uuid) for g in self.gpus)))
        return True

    async def watch(self) -> None:
        """Sample for ever. Where nothing can be measured the first sample has said it all."""
        while True:
            await asyncio.sleep(_SAMPLE_INTERVAL_S)
            if self._provider is None or self._provider.measures:
                await self.sample()

    def used(self, placement: Placement) -> int | None:
        """Bytes in use on the placement's GPUs in the last sample, everybody's; None when not measured."""
        used = [gpu.used_bytes for gpu in self.gpus if gpu.index in placement.gpus and gpu.used_bytes is not None]
        return sum(used) if used and len(used) == len(placement.gpus) else None

    async def measure(self, placement: Placement) -> int | None:
        """`used`, of a sample taken now; None where nothing can be measured."""
        if self._provider is None or not self._provider.measures or not placement.gpus:
            return None
        return self.used(placement) if await self.sample() else None

    def held_by(self, pids: Set[int], placement: Placement) -> int:
        """Bytes that these processes held in the last sample, on the GPU of the placement where it is most; 0 when unknown."""
        gpus = (gpu for gpu in self.gpus if gpu.index in placement.gpus)
        return max((sum(size for pid, size in gpu.by_pid.items() if pid in pids) for gpu in gpus), default=0)

    @staticmethod
    def awake_bytes(model: Model) -> int:
        """What a model is reckoned to hold per GPU while awake."""
        return vram_bytes(model)

    async def wait_freed(self, placement: Placement, before: int, expected_per_gpu: int) -> int | None:
        """Bytes freed per GPU since `before`: as soon as they are what is expected, or no longer grow; None if unmeasurable."""
        freed, steady = 0, 0
        for _ in range(round(_SETTLE_S / _POLL_S)):
            now = await self.measure(placement)
            if now is None:
                return None
            more = (before - now) // len(placement.gpus)
            steady = steady + 1 if more <= freed else 0
            freed = max(freed, more)
            if freed >= expected_per_gpu or (freed > 0 and steady * _POLL_S >= _STEADY_S):
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

    async def reopen(self) -> None:
        """Read the GPUs by the configuration that is in force now."""
        await self.close()
        await self.sample()

    async def close(self) -> None:
        async with self._lock:
            provider, self._provider = self._provider, None
        if provider is not None:
            await provider.close()
