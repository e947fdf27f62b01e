"""Declared GPUs, with nothing to measure them: what the scheduler reserves is all that is known."""

from mmd.config import Gpus
from mmd.errors import MmdError
from mmd.gpu import GpuMemory

__all__ = ["StaticProvider", "declared_memory"]


def declared_memory(gpus: Gpus) -> tuple[int, ...]:
    """The configured memory of each GPU, by index; MmdError when one has none."""
    sizes = tuple(device.memory_bytes or 0 for device in gpus.devices)
    for index, size_bytes in enumerate(sizes):
        if size_bytes <= 0:
            raise MmdError(
                f"gpus.devices[{index}]: provider `{gpus.provider}` needs the memory of each GPU",
                hint="such as devices: [{memory: 24GiB}]",
            )
    return sizes


class StaticProvider:
    """See `mmd.gpu.GpuProvider`."""

    measures = False

    def __init__(self, gpus: Gpus) -> None:
        self._sample = tuple(
            GpuMemory(index=index, uuid=f"static-{index}", name="declared", total_bytes=size_bytes, used_bytes=None)
            for index, size_bytes in enumerate(declared_memory(gpus))
        )

    async def sample(self) -> tuple[GpuMemory, ...]:
        return self._sample

    async def close(self) -> None:
        """Holds nothing."""
