"""Real GPUs, through a probe process: a driver call that hangs or crashes costs an answer, never the gateway's event loop."""

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any

from mmd.config import Gpus
from mmd.errors import MmdError
from mmd.gpu import GpuMemory

__all__ = ["NoDriverError", "NvmlProvider"]

_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 20.0
"""The first call on a machine without persistence mode initialises the driver: seconds for each GPU."""

_EXIT_TIMEOUT_S = 1.0
_LINE_MAX_BYTES = 1 << 20


class NoDriverError(MmdError):
    """There is no NVIDIA driver on this machine."""


class NvmlProvider:
    """See `mmd.gpu.GpuProvider`. The probe is started when it is first needed, and again after it failed."""

    measures = True

    def __init__(self, gpus: Gpus, *, timeout_s: float = _TIMEOUT_S, start_timeout_s: float = _START_TIMEOUT_S) -> None:
        selectors = (device.selector for device in gpus.devices if device.selector is not None)
        self._arguments = [word for selector in selectors for word in ("--device", str(selector))]
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, gpus: Gpus) -> "NvmlProvider":
        """A provider that has answered once; NoDriverError, MmdError."""
        provider = cls(gpus)
        try:
            await provider.sample()
        except BaseException:
            await provider.close()
            raise
        return provider

    async def sample(self) -> tuple[GpuMemory, ...]:
        async with self._lock:
            answer = await self._ask()
        if "error" in answer:
            if answer["no_driver"]:
                raise NoDriverError(str(answer["error"]), hint="install the NVIDIA driver, or set gpus.provider")
            raise MmdError(str(answer["error"]), hint="nvidia-smi")
        return tuple(_gpu(raw) for raw in answer["gpus"])

    async def close(self) -> None:
        """End the probe."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _ask(self) -> dict[str, Any]:
        """One line to the probe and one back; a probe that fails at that is ended, and the next call starts another."""
        timeout_s = self._timeout_s if self._process is not None else self._start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(self._process or await self._start())
        except TimeoutError:
            await self.close()
            raise MmdError(f"the GPU probe did not answer within {timeout_s:g} s", hint="nvidia-smi") from None
        except (OSError, EOFError, ValueError) as error:
            status = await self._status()
            raise MmdError(f"the GPU probe ended with status {status}: {error}", hint="nvidia-smi") from error
        except asyncio.CancelledError:  # its answer may still come, and would be taken for the next one's
            await self.close()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mmd.gpu.probe", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_MAX_BYTES,
        )
        return self._process

    async def _exchange(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise EOFError("no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def _status(self) -> int | None:
        """How the probe ended. It is given a moment to: Popen.kill would reap a dead one and lose its status."""
        process = self._process
        if process is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_EXIT_TIMEOUT_S):
                    await process.wait()
        await self.close()
        return None if process is None else process.returncode


def _gpu(raw: dict[str, Any]) -> GpuMemory:
    return GpuMemory(
        index=raw["index"],
        uuid=raw["uuid"],
        name=raw["name"],
        total_bytes=raw["total_bytes"],
        used_bytes=raw["used_bytes"],
        by_pid={int(pid): size_bytes for pid, size_bytes in raw["by_pid"].items()},
    )
