"""The state of a simulated engine: loading, its memory, sleep and wake as vLLM 0.32 does them, and the faults asked for."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import NoReturn, TypeVar

from mmd.engines.sim import RESIDUAL_SHARE
from mmd.sim.errors import RefusedError
from mmd.sim.ledger import HOST, Claim, Ledger, OutOfMemoryError
from mmd.sim.options import Options

__all__ = ["Engine"]

_T = TypeVar("_T")

_SHARDS = 10
_KINDS = frozenset({"weights", "kv_cache"})
"""What vLLM's sleep frees and its wake brings back, by tag."""


class Engine:
    """One simulated engine. Everything runs on one event loop."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.in_flight = 0
        self.served = 0
        self.level = 0
        self.weights_valid = True
        self.aborts = 0
        """Grows when everything in flight is to be cut off."""
        self._claim: Claim | None = None
        self._host_claim: Claim | None = None
        self._sleeps = 0
        self._asleep: set[str] = set()
        self._awake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_sleeping(self) -> bool:
        return not self._awake.is_set()

    async def load(self) -> None:
        """Take the configured time, tell how it goes in vLLM's words, then allocate. Exits the process where it fails."""
        options, faults = self.options, self.options.faults
        self._log(f"INFO Starting to load model {options.model}...")
        for shard in range(1, _SHARDS + 1):
            await asyncio.sleep(options.load_time_s / _SHARDS)
            bar = f"{100 * shard // _SHARDS:3d}% Completed | {shard}/{_SHARDS}"
            self._log(f"\rLoading safetensors checkpoint shards: {bar}", end="\n" if shard == _SHARDS else "")
            if faults.exit_during_load is not None and shard == _SHARDS // 2:
                die("\nERROR EngineCore failed to start.\nRuntimeError: told to exit while loading", faults.exit_during_load)
        self._log(f"INFO Loading weights took {options.load_time_s:.2f} seconds")
        if options.gpus and options.vram_bytes:
            ledger = Ledger(options.sim_dir)
            ledger.create()
            totals = {gpu: options.gpu_memory_bytes[gpu] for gpu in options.gpus}
            self._claim = _or_die(lambda: ledger.claim(options.vram_bytes, owner=options.model, totals=totals))
        self._log(f"INFO Model loading took {options.vram_bytes / 2**30:.2f} GiB memory and {options.load_time_s:.6f} seconds")
        self._log("INFO init engine (profile, create kv cache, warmup model) took 0.00 s")
        self._awake.set()

    def _log(self, line: str, *, end: str = "\n") -> None:
        if not self.options.faults.silent_load:
            print(line, end=end, flush=True)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """One inference request. Waits silently while the engine sleeps: vLLM 0.32 holds it, and no gauge shows it."""
        faults = self.options.faults
        if _reached(self.served, faults.die_after_requests):
            die("ERROR EngineCore encountered a fatal error: told to die", 1)
        if _reached(self.served, faults.stall_after_requests):
            await asyncio.Event().wait()
        await self._awake.wait()
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.served += 1
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    async def running(self) -> None:
        """Return at once, or when the engine is awake again: what `mode=keep` does to requests in flight."""
        await self._awake.wait()

    async def health(self) -> bool:
        """False once EngineCore is "dead"; never returns once the engine has stalled."""
        faults = self.options.faults
        if _reached(self.served, faults.stall_after_requests):
            await asyncio.Event().wait()
        return not (faults.never_healthy or _reached(self.served, faults.unhealthy_after_requests))

    async def sleep(self, level: int, mode: str) -> None:
        """POST /sleep. Asleep already: nothing happens, so a level 1 sleeper does not become a level 2 one."""
        if self.options.faults.sleep_fails:
            raise RefusedError("told to fail to sleep")
        if self.is_sleeping:
            return
        if mode == "abort":
            self.aborts += 1
        if mode != "keep":
            await self._idle.wait()
        self._awake.clear()
        self.level = level
        if level == 0:  # paused: everything stays in memory
            return
        self._asleep = set(_KINDS)
        self.weights_valid = level == 1
        self._sleeps += 1
        if self._claim and not self.options.faults.sleep_keeps_memory:
            residual = int(self.options.vram_bytes * RESIDUAL_SHARE[level]) + self._sleeps * self.options.faults.sleep_leaks
            if level == 1:
                self._move_to_host((self.options.vram_bytes - residual) * len(self.options.gpus))
            self._claim.resize(min(residual, self.options.vram_bytes))
        await asyncio.sleep(self.options.sleep_time_s)  # last, so that nothing sees an engine half asleep

    def _move_to_host(self, size_bytes: int) -> None:
        """Host memory for what a level 1 sleep moves there. It dies where there is not that much, as a failing cudaMallocHost
        makes a real one."""
        total_bytes = self.options.host_memory_bytes
        if total_bytes is not None and size_bytes > 0:
            ledger = Ledger(self.options.sim_dir)
            self._host_claim = _or_die(lambda: ledger.claim(size_bytes, owner=self.options.model, totals={HOST: total_bytes}))

    async def wake(self, tags: Iterable[str]) -> bool:
        """POST /wake_up: whether it is fully awake now. No tags mean all; unknown ones do nothing."""
        if self.options.faults.wake_fails:
            raise RefusedError("told to fail to wake")
        wanted = set(tags) or _KINDS | {"scheduling"}
        waking = self._asleep & wanted
        if waking:
            if self._claim:
                claim = self._claim
                _or_die(lambda: claim.resize(self.options.vram_bytes))
            if self._host_claim:
                self._host_claim.release()
            if "weights" in waking:
                await asyncio.sleep(self.options.wake_time_s)
            self._asleep -= waking
        if not self._asleep:
            self.level = 0
            self._awake.set()
        return not self.is_sleeping

    def reload_weights(self) -> None:
        """POST /collective_rpc reload_weights; the weights' memory must be back first."""
        if "weights" in self._asleep:
            raise RefusedError("reload_weights: the weights' memory is asleep")
        self.weights_valid = True


def _or_die(allocate: Callable[[], _T]) -> _T:
    try:
        return allocate()
    except OutOfMemoryError as error:
        die(f"ERROR EngineCore failed.\ntorch.OutOfMemoryError: CUDA out of memory. {error.message}.", 1)


def _reached(served: int, limit: int | None) -> bool:
    return limit is not None and served >= limit


def die(message: str, status: int) -> NoReturn:
    """End the process at once, as a crash does: nothing is answered, nothing is tidied up."""
    print(message, file=sys.stderr, flush=True)
    os._exit(status)
