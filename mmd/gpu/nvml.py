"""Real GPUs, through a probe process: a driver call that hangs or crashes costs an answer, never the gateway's event loop."""

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
    """See `mmd.gpu.GpuProvider`. The probe is started when it is first needed, and again after it failed.

    `probe_socket` is where systemd starts one (mmd-gpu-probe.socket), with the access to devices that the gateway has not.
    Where it does not exist (a user's own instance, a test) the probe is a child of this process.
    """

    measures = True

    def __init__(
        self,
        gpus: Gpus,
        *,
        probe_socket: Path | None = None,
        timeout_s: float = _TIMEOUT_S,
        start_timeout_s: float = _START_TIMEOUT_S,
    ) -> None:
        selectors = [str(device.selector) for device in gpus.devices if device.selector is not None]
        self._question = json.dumps(selectors).encode() + b"\n"
        self._probe_socket = probe_socket
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._probe: _Probe | None = None
        self._lock = asyncio.Lock()

    @classmethod
    async def open(cls, gpus: Gpus, probe_socket: Path | None = None) -> "NvmlProvider":
        """A provider that has answered once; NoDriverError, MmdError."""
        provider = cls(gpus, probe_socket=probe_socket)
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
                # What has failed once in a process may do so for ever: it has a library of the driver before.
                await self.close()
        if "error" not in answer:
            return tuple(_gpu(raw) for raw in answer["gpus"])
        if answer["no_driver"]:
            raise NoDriverError(str(answer["error"]), hint="install the NVIDIA driver, or set gpus.provider")
        raise MmdError(str(answer["error"]), hint="nvidia-smi")

    async def close(self) -> None:
        """End the probe."""
        probe, self._probe = self._probe, None
        if probe is not None:
            await probe.end()

    async def _ask(self) -> dict[str, Any]:
        """One line to the probe and one back; a probe that fails at that is ended, and the next call starts another."""
        timeout_s = self._timeout_s if self._probe is not None else self._start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if self._probe is None:
                    self._probe = await _start(self._probe_socket)
                return await self._probe.exchange(self._question)
        except TimeoutError:
            await self.close()
            raise MmdError(f"the GPU probe did not answer within {timeout_s:g} s", hint="nvidia-smi") from None
        except (OSError, EOFError, ValueError) as error:
            status = "" if self._probe is None else await self._probe.status()
            await self.close()
            raise MmdError(f"the GPU probe ended{status}: {error}", hint="nvidia-smi") from error
        except asyncio.CancelledError:  # its answer may still come, and would be taken for the next one's
            await self.close()
            raise


@dataclass(frozen=True, slots=True)
class _Probe:
    """A running probe: our child, or (process None) systemd's."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    process: asyncio.subprocess.Process | None = None

    async def exchange(self, question: bytes) -> dict[str, Any]:
        self.writer.write(question)
        await self.writer.drain()
        line = await self.reader.readline()
        if not line:
            raise EOFError("no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def status(self) -> str:
        """How a child ended. It is given a moment to: Popen.kill would reap a dead one and lose its status."""
        if self.process is None:
            return ""
        with suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                await self.process.wait()
        return f" with status {self.process.returncode}"

    async def end(self) -> None:
        self.writer.close()
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


async def _start(probe_socket: Path | None) -> _Probe:
    if probe_socket is not None:
        with suppress(FileNotFoundError):
            return _Probe(*await asyncio.open_unix_connection(probe_socket, limit=_LINE_MAX_BYTES))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-m", "mmd.gpu.probe"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_MAX_BYTES,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return _Probe(process.stdout, process.stdin, process)


def _gpu(raw: dict[str, Any]) -> GpuMemory:
    return GpuMemory(
        index=raw["index"],
        uuid=raw["uuid"],
        name=raw["name"],
        total_bytes=raw["total_bytes"],
        used_bytes=raw["used_bytes"],
        by_pid={int(pid): size_bytes for pid, size_bytes in raw["by_pid"].items()},
        parent_uuid=raw["parent_uuid"],
    )
