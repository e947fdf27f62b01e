"""GPUs and their memory. One module per provider; `open_provider` finds the configured one.

- `nvml`: real ones, measured through NVIDIA's library in a process of its own (`probe`)
- `static`: declared, not measured
- `sim`: declared, and used by simulated engines (mmd.sim.ledger)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mmd.config import Gpus, Provider

__all__ = ["GpuMemory", "GpuProvider", "open_provider"]


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """One GPU at one moment."""

    index: int
    """In PCI bus order, as CUDA counts with CUDA_DEVICE_ORDER=PCI_BUS_ID; of a slice (MIG) as mmd.names says."""
    uuid: str
    name: str
    total_bytes: int
    """What programs may have: without what the driver keeps for itself."""
    used_bytes: int | None
    """Everybody's; None when it is not measured."""
    by_pid: Mapping[int, int] = field(default_factory=dict)
    """Bytes by (host) process id; empty when that is not known."""
    parent_uuid: str = ""
    """Of a slice: the divided GPU's."""


class GpuProvider(Protocol):
    @property
    def measures(self) -> bool:
        """Whether `used_bytes` is real."""

    async def sample(self) -> tuple[GpuMemory, ...]:
        """The GPUs now, by index; MmdError when they cannot be read. Never blocks the event loop, and ends within seconds."""

    async def close(self) -> None: ...


async def open_provider(gpus: Gpus, sim_dir: Path, probe_socket: Path | None = None) -> GpuProvider:
    """The provider that the configuration asks for; MmdError when it does not work here.

    `auto` is NVML where there is a driver, in order or not, and no GPUs at all where there is none. `probe_socket` is
    mmd-gpu-probe.socket's.
    """
    from mmd.gpu.nvml import NoDriverError, NvmlProvider
    from mmd.gpu.sim import SimProvider
    from mmd.gpu.static import StaticProvider

    match gpus.provider:
        case Provider.STATIC:
            return StaticProvider(gpus)
        case Provider.SIM:
            return SimProvider(gpus, sim_dir)
        case Provider.NVML:
            return await NvmlProvider.open(gpus, probe_socket)
        case Provider.AUTO:
            try:
                return await NvmlProvider.open(gpus, probe_socket)
            except NoDriverError:
                return StaticProvider(Gpus())
