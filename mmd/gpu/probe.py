"""The program that talks to NVML, for those who must neither block nor open devices: `python -m mmd.gpu.probe`.

Each line on stdin is a JSON list of the GPUs that are meant, indexes or UUIDs as strings; an empty list means all. Each is
answered by one line: `{"gpus": [...]}` or `{"error": ..., "no_driver": bool}`. It ends when stdin does, and is killed with its
parent even while a driver call hangs; such a call ends it in any case, since nobody waits for its answer any longer. `--once`
answers for all GPUs without being asked. systemd runs it with a socket as stdin and stdout (mmd-gpu-probe@.service).

NVML (nvidia-ml-py): memory info version 2 tells what the driver keeps (`reserved`) apart from what programs use; version 1, on
drivers before 510, counts it as used. Process ids are the host's. A process's memory may be unknown (None).

A divided GPU (MIG) is not one that programs can use: its slices stand in its place, each with its own memory and processes,
while the divided GPU's own figures are sums. The compute instances of one GPU instance share its memory, so the first of them
stands for all.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from mmd.names import divided_gpu, is_slice, slice_index

__all__ = ["has_hardware", "main"]

_PR_SET_PDEATHSIG = 1  # prctl(2)

# Longer than the gateway waits for the slowest answer (mmd.gpu.nvml). A probe that hung for ever would hold one of the few
# connections of mmd-gpu-probe.socket.
_LIMIT_S = 30

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_DISPLAY = "0x03"  # base class of graphics cards and of accelerators without a display connector

_NO_SUCH_DEVICE = (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument, pynvml.NVMLError_NotSupported)
_NO_VERSION_2 = (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m mmd.gpu.probe", description="GPU memory as lines of JSON")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--limit", type=int, default=_LIMIT_S, help="end when an answer takes longer, in seconds")
    arguments = parser.parse_args(argv)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        return 1
    with redirect_stdout(sys.stderr):  # whatever a library prints must not become an answer
        for line in ["[]"] if arguments.once else sys.stdin:
            signal.alarm(arguments.limit)  # SIGALRM ends a process even inside a library
            answer = _answer(json.loads(line))
            signal.alarm(0)
            print(json.dumps(answer), file=sys.__stdout__, flush=True)
    return 0


def has_hardware(pci_devices: Path = _PCI_DEVICES) -> bool:
    """Whether there is an NVIDIA GPU on the PCI bus (sysfs(5)), with or without a driver."""
    return any(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY) for device in pci_devices.glob("*")
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it has been unplugged
        return ""


def _answer(selectors: Sequence[str]) -> dict[str, Any]:
    """One sample. NVML stays open: further calls of nvmlInit only count, and after a failure they try again."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": f"NVML: {error}", "no_driver": _no_driver(error)}
    try:
        return {"gpus": [_gpu(device) for device in _devices(selectors)]}
    except (pynvml.NVMLError, LookupError) as error:
        return {"error": str(error), "no_driver": False}


def _no_driver(error: pynvml.NVMLError) -> bool:
    """Whether this machine has no NVIDIA driver: no library, or a library for which there is no GPU. A GPU whose kernel module
    is not loaded is a driver that fails."""
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        return True
    return isinstance(error, pynvml.NVMLError_DriverNotLoaded) and not has_hardware()


@dataclass(frozen=True, slots=True)
class _Device:
    """What programs can use: a whole GPU, or a slice of a divided one."""

    index: int
    handle: Any
    memory: tuple[int, int | None]
    """Which memory it has: GPU and, of a slice, GPU instance."""
    parent_uuid: str = ""


def _devices(selectors: Sequence[str]) -> list[_Device]:
    """All devices, or the selected ones, by index; LookupError names a selector that fits none."""
    count = pynvml.nvmlDeviceGetCount()
    found = [device for selector in selectors or map(str, range(count)) for device in _selected(selector, count)]
    by_memory: dict[tuple[int, int | None], _Device] = {}
    for device in sorted(found, key=lambda device: device.index):
        by_memory.setdefault(device.memory, device)
    return list(by_memory.values())


def _selected(selector: str, count: int) -> list[_Device]:
    try:
        parent, handle = _find(selector)
    except _NO_SUCH_DEVICE:
        raise LookupError(f"gpus.devices: no GPU {selector!r} among {count}") from None
    return _parts(handle) if parent is None else [_slice(parent, handle)]


def _find(selector: str) -> tuple[Any, Any]:
    """The handle that an index or a UUID stands for; of a slice, its GPU's handle before it."""
    if selector.startswith("MIG-"):
        handle = pynvml.nvmlDeviceGetHandleByUUID(selector)
        return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), handle
    if not selector.isdecimal():
        return None, pynvml.nvmlDeviceGetHandleByUUID(selector)
    if not is_slice(int(selector)):
        return None, pynvml.nvmlDeviceGetHandleByIndex(int(selector))
    gpu, number = divided_gpu(int(selector))
    parent = pynvml.nvmlDeviceGetHandleByIndex(gpu)
    return parent, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, number)


def _parts(handle: Any) -> list[_Device]:
    """The GPU itself, or the slices that it is divided into."""
    if not _is_divided(handle):
        index = pynvml.nvmlDeviceGetIndex(handle)
        return [_Device(index, handle, (index, None))]
    slices = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            slices.append(_slice(handle, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)))
        except pynvml.NVMLError_NotFound:
            continue
    return slices


def _slice(parent: Any, handle: Any) -> _Device:
    gpu = pynvml.nvmlDeviceGetIndex(parent)
    index = slice_index(gpu, pynvml.nvmlDeviceGetIndex(handle))
    return _Device(index, handle, (gpu, pynvml.nvmlDeviceGetGpuInstanceId(handle)), pynvml.nvmlDeviceGetUUID(parent))


def _gpu(device: _Device) -> dict[str, Any]:
    total_bytes, used_bytes = _memory(device.handle)
    return {
        "index": device.index,
        "uuid": pynvml.nvmlDeviceGetUUID(device.handle),
        "name": pynvml.nvmlDeviceGetName(device.handle),
        "total_bytes": total_bytes,
        "used_bytes": used_bytes,
        "by_pid": _by_pid(device.handle),
        "parent_uuid": device.parent_uuid,
    }


def _is_divided(handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):  # drivers before 450 know no MIG
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _memory(handle: Any) -> tuple[int, int]:
    """(what programs may have, what of it is not free). The same total as CUDA's cudaMemGetInfo, within some MiB."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        total_bytes = info.total - info.reserved
    except _NO_VERSION_2:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total_bytes = info.total
    return total_bytes, total_bytes - info.free


def _by_pid(handle: Any) -> dict[int, int]:
    """Empty unless the memory of every process is known: half an answer would look like memory that nobody holds."""
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        return {}
    if any(process.usedGpuMemory is None for process in processes):
        return {}
    found: dict[int, int] = {}
    for process in processes:
        found[process.pid] = found.get(process.pid, 0) + process.usedGpuMemory
    return found


if __name__ == "__main__":
    sys.exit(main())
