"""GPU memory as the gateway measures it: samples for the scheduler, and proof that memory which should come back did."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Set
from contextlib import suppress
from dataclasses import replace

from mmd.config import Model
from mmd.errors import MmdError
from mmd.gpu import GpuMemory, GpuProvider
from mmd.names import Placement
from mmd.policy.events import GpuSample, Sampled
from mmd.shortage import is_shortage
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
_RETRY_MAX_S = 30.0
"""Between two tries while the GPUs cannot be read, at most: each may start a probe and leave lines in the journal."""


class Memory:
    """Samples a provider, which `open_provider` opens when it is first needed and again after it could not be opened.

    `on_sample` is told of every sample. One that was taken while some unit's memory changed is not passed on: it may be older
    than what the scheduler has heard of that unit, and would look like memory that somebody else has taken.

    While the GPUs cannot be read (the driver is gone, hangs, does not fit its library) nothing counts as measured, and nobody
    waits for a driver call: only `watch` goes on trying, ever less often. The scheduler keeps the last totals and the last
    foreign use. That may leave memory unused which others have given back; to forget it would start engines that run out of
    memory.
    """

    def __init__(self, open_provider: Callable[[], Awaitable[GpuProvider]], on_sample: Callable[[Sampled], None]) -> None:
        self._open_provider = open_provider
        self._provider: GpuProvider | None = None
        self._on_sample = on_sample
        self._lock = asyncio.Lock()
        self._told = asyncio.Event()
        self._changes = 0
        self.gpus: tuple[GpuMemory, ...] = ()
        self.problem = ""
        """Why the GPUs cannot be read at present; "" when they can."""

    def changed(self) -> None:
        """Some unit's memory begins to change, or has done so."""
        self._changes += 1

    async def sample(self) -> bool:
        """Take a sample, and whether that worked; it does not while the GPUs could not be read the last time."""
        return not self.problem and await self._take()

    async def _take(self, *, again: bool = False) -> bool:
        """One try; `again`: although the last one failed."""
        changes = self._changes
        async with self._lock:
            if self.problem and not again:
                return False  # somebody has found out while we waited
            try:
                if self._provider is None:
                    self._provider = await self._open_provider()
                self.gpus = await self._provider.sample()
            except Exception as error:
                if is_shortage(error):  # of our own: the GPUs are as they were, and the next sample comes soon
                    _log.warning("no sample of the GPUs: %s", error)
                    return False
                if not isinstance(error, MmdError):
                    _log.exception("a sample of the GPUs failed")
                self._fail(str(error))
                return False
            if self.problem:
                _log.info("the GPUs can be read again")
            self.problem = ""
        if changes == self._changes:
            self._tell(Sampled(tuple(map(_for_scheduler, self.gpus))))
        return True

    def _fail(self, problem: str) -> None:
        if not self.problem:
            known = "what was last known of them counts" if self.gpus else "models that need one cannot start"
            _log.warning("the GPUs cannot be read, so until they can %s: %s", known, problem)
        self.problem = problem
        self.gpus = tuple(replace(gpu, used_bytes=None, by_pid={}) for gpu in self.gpus)
        self._tell(Sampled((), problem))

    def _tell(self, sampled: Sampled) -> None:
        self._on_sample(sampled)
        self._told.set()

    async def first(self, timeout_s: float) -> None:
        """Wait until `watch` has taken the first sample, or could not, but not longer than `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told.wait()

    async def watch(self) -> None:
        """Sample for ever. Where nothing can be measured the first sample has said it all."""
        wait_s = _SAMPLE_INTERVAL_S
        while True:
            if self._provider is None or self._provider.measures:
                await self._take(again=True)
            wait_s = min(2 * wait_s, _RETRY_MAX_S) if self.problem else _SAMPLE_INTERVAL_S
            await asyncio.sleep(wait_s)

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
        await self._take(again=True)

    async def close(self) -> None:
        async with self._lock:
            provider, self._provider = self._provider, None
        if provider is not None:
            await provider.close()


def _for_scheduler(gpu: GpuMemory) -> GpuSample:
    return GpuSample(gpu.index, gpu.total_bytes, gpu.used_bytes, gpu.uuid, gpu.parent_uuid)
