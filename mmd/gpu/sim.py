"""Simulated GPUs: as large as declared, as full as the simulated engines have made them."""

import asyncio
from collections import Counter
from pathlib import Path

from mmd.config import Gpus
from mmd.errors import MmdError
from mmd.gpu import GpuMemory
from mmd.gpu.static import declared_memory
from mmd.sim.ledger import Ledger

__all__ = ["SimProvider"]


class SimProvider:
    """See `mmd.gpu.GpuProvider`."""

    measures = True

    def __init__(self, gpus: Gpus, sim_dir: Path) -> None:
        self._totals = declared_memory(gpus)
        self._ledger = Ledger(sim_dir)

    async def sample(self) -> tuple[GpuMemory, ...]:
        try:
            allocations = await asyncio.to_thread(self._ledger.read)  # may wait for the ledger's lock
        except OSError as error:
            raise MmdError(f"the simulated GPUs cannot be read: {error}") from error
        by_pid: list[Counter[int]] = [Counter() for _ in self._totals]
        for allocation in allocations:
            if 0 <= allocation.gpu < len(by_pid):
                by_pid[allocation.gpu][allocation.pid] += allocation.bytes
        return tuple(
            GpuMemory(
                index=index,
                uuid=f"sim-{index}",
                name="simulated",
                total_bytes=total_bytes,
                used_bytes=used.total(),
                by_pid=dict(used),
            )
            for index, (total_bytes, used) in enumerate(zip(self._totals, by_pid, strict=True))
        )

    async def close(self) -> None:
        """Holds nothing."""
