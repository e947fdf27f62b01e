"""The program that talks to NVML, for those who must neither block nor open devices: `python -m mmd.gpu.probe`.

Each line on stdin is a JSON list of the GPUs that are meant, indexes or UUIDs as strings; an empty list means all. Each is
answered by one line: `{"gpus": [...]}` or `{"error": ..., "no_driver": bool}`. It ends when stdin does, and is killed with its
parent even while a driver call hangs. `--once` answers for all GPUs without being asked. systemd runs it with a socket as stdin
and stdout (mmd-gpu-probe@.service).

NVML (nvidia-ml-py): memory info version 2 tells what the driver keeps (`reserved`) apart from what programs use; version 1, on
drivers before 510, counts it as used. Process ids are the host's. A process's memory may be unknown (None).
"""

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import pynvml

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1  # prctl(2)

_NO_DRIVER = (
    pynvml.NVMLError_LibraryNotFound,  # no libnvidia-ml.so.1
    pynvml.NVMLError_DriverNotLoaded,  # the library, but no kernel module
)

_NO_VERSION_2 = (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument)


def main(argv: Sequence[str] | None = None) -> int:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m mmd.gpu.probe", description="GPU memory as lines of JSON")
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args(argv)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was told
        return 1
    with redirect_stdout(sys.stderr):  # whatever a library prints must not become an answer
        for line in ["[]"] if arguments.once else sys.stdin:
            print(json.dumps(_answer(json.loads(line))), file=sys.__stdout__, flush=True)
    return 0


def _answer(selectors: Sequence[str]) -> dict[str, Any]:
    """One sample. NVML stays open: further calls of nvmlInit only count, and after a failure they try again."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": f"NVML: {error}", "no_driver": isinstance(error, _NO_DRIVER)}
    try:
        return {"gpus": sorted((_gpu(handle) for handle in _handles(selectors)), key=lambda gpu: int(gpu["index"]))}
    except (pynvml.NVMLError, LookupError) as error:
        return {"error": str(error), "no_driver": False}


def _handles(selectors: Sequence[str]) -> list[Any]:
    """All GPUs, or the selected ones; LookupError names a selector that fits none."""
    count = pynvml.nvmlDeviceGetCount()
    if not selectors:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    return [_handle(selector, count) for selector in selectors]


def _handle(selector: str, count: int) -> Any:
    try:
        if selector.isdecimal():
            return pynvml.nvmlDeviceGetHandleByIndex(int(selector))
        return pynvml.nvmlDeviceGetHandleByUUID(selector)
    except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
        raise LookupError(f"gpus.devices: no GPU {selector!r} among {count}") from None


def _gpu(handle: Any) -> dict[str, Any]:
    index = pynvml.nvmlDeviceGetIndex(handle)
    if _is_divided(handle):
        raise LookupError(f"GPU {index} is in MIG mode, where a whole GPU cannot be used; restrict gpus.devices to the others")
    total_bytes, used_bytes = _memory(handle)
    return {
        "index": index,
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "name": pynvml.nvmlDeviceGetName(handle),
        "total_bytes": total_bytes,
        "used_bytes": used_bytes,
        "by_pid": _by_pid(handle),
    }


def _is_divided(handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError_NotSupported:
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
    except pynvml.NVMLError_NotSupported:
        return {}
    if any(process.usedGpuMemory is None for process in processes):
        return {}
    found: dict[int, int] = {}
    for process in processes:
        found[process.pid] = found.get(process.pid, 0) + process.usedGpuMemory
    return found


if __name__ == "__main__":
    sys.exit(main())
