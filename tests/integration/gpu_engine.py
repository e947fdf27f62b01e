"""An engine that holds as much GPU memory as it is told to. It loads nothing of mmd: any Python 3.11 runs it.

    gpu_engine.py --hold BYTES [--port PORT]

With PORT it serves /health and /v1/chat/completions: a chat that says `hold BYTES` changes what it holds, and each is answered
with what it holds then. Without, it holds the memory until its stdin ends, as a program that mmd knows nothing of.

The memory is real, allocated through CUDA's driver API on the first GPU that CUDA_VISIBLE_DEVICES shows it; or, with
FAKE_NVML_STATE in the environment, written down in the state of the fake NVML (tests/unit/fakenvml/fakenvml.c). Where it does
not suffice, the engine fails as engines do.
"""

import argparse
import ctypes
import fcntl
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Protocol

_CUDA_ERROR_OUT_OF_MEMORY = 2


class OutOfMemoryError(Exception):
    pass


class Memory(Protocol):
    def hold(self, size_bytes: int) -> None:
        """Hold this much, instead of what was held before; OutOfMemoryError, and then nothing is held."""


class CudaMemory:
    """One allocation in the primary context of the first visible GPU. Of one thread: a context belongs to it."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._block = ctypes.c_uint64()
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def hold(self, size_bytes: int) -> None:
        if self._block:
            self._call("cuMemFree_v2", self._block)
            self._block = ctypes.c_uint64()
        if size_bytes:
            self._call("cuMemAlloc_v2", ctypes.byref(self._block), ctypes.c_size_t(size_bytes))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code == _CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError
        if code:
            raise OSError(f"{name}: CUDA error {code}")


class FakeMemory:
    """A `hold` line of this process in the state of the fake NVML."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")

    def hold(self, size_bytes: int) -> None:
        with self._state.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [line for line in self._state.read_text().splitlines() if not _is_hold_of(line, os.getpid())]
            device, free_bytes = _device(lines, self._visible)
            fits = size_bytes <= free_bytes
            if size_bytes and fits:
                lines.append(f"hold {device} {os.getpid()} {size_bytes}")
            new = self._state.with_suffix(f".{os.getpid()}")
            new.write_text("".join(f"{line}\n" for line in lines))
            new.rename(self._state)
        if not fits:
            raise OutOfMemoryError


def _is_hold_of(line: str, pid: int) -> bool:
    return line.startswith("hold ") and line.split()[2] == str(pid)


def _device(lines: list[str], visible: str) -> tuple[str, int]:
    """The device that CUDA would see, as the fake NVML calls it, and what is free on it."""
    gpus = [line.split() for line in lines if line.startswith("gpu ")]
    slices = [line.split() for line in lines if line.startswith("slice ")]
    if visible.startswith("MIG-"):
        name, sizes = next((words[1], words[4:7]) for words in slices if words[2] == visible)
    else:
        name, sizes = visible, gpus[int(visible)][2:5]
    total, reserved, used = map(int, sizes)
    holds = [line.split() for line in lines if line.startswith("hold ")]
    held = sum(int(words[3]) for words in holds if words[1] == name and _runs(int(words[2])))
    return name, total - reserved - used - held


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Handler(BaseHTTPRequestHandler):
    memory: Memory
    held_bytes: int

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        words = body["messages"][-1]["content"].split()
        if words[0] == "hold":
            try:
                type(self).held_bytes = 0
                self.memory.hold(int(words[1]))
            except OutOfMemoryError:
                self._answer(
                    500, {"error": {"message": "CUDA out of memory", "type": "server_error", "param": None, "code": None}}
                )
                return
            type(self).held_bytes = int(words[1])
        message = {"role": "assistant", "content": f"{self.held_bytes} on {os.environ.get('CUDA_VISIBLE_DEVICES')}"}
        self._answer(200, {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Health checks are too many to log."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hold", type=int, required=True)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    state = os.environ.get("FAKE_NVML_STATE")
    memory = FakeMemory(Path(state)) if state else CudaMemory()
    try:
        memory.hold(options.hold)
    except OutOfMemoryError:
        print("CUDA out of memory", file=sys.stderr)
        return 1
    print("holding as", os.getpid(), flush=True)
    if options.port is None:
        sys.stdin.read()
        return 0
    Handler.memory, Handler.held_bytes = memory, options.hold
    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
