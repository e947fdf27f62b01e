"""The gateway's view of the GPUs when NVML fails and comes back: the real pynvml over a fake libnvidia-ml.so.1."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from mmd.config import Device, Gpus, Provider
from mmd.errors import MmdError
from mmd.gateway.memory import Memory
from mmd.gpu import GpuProvider
from mmd.gpu.nvml import NvmlProvider
from mmd.names import Placement
from mmd.policy.events import Sampled

GIB = 1 << 30
GPU = f"gpu GPU-aa {24 * GIB} 0 {5 * GIB}\nprocess 0 17 {3 * GIB}\n"
FIRST = Placement((0,))
FAULTS = ["init 18", "hang", "crash", "stale"]


async def open_nvml() -> GpuProvider:
    return NvmlProvider(Gpus(provider=Provider.NVML), timeout_s=0.5, start_timeout_s=3.0)


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Memory, list[Sampled]]]:
    """A Memory that has taken its first sample, or could not, and all that it has said."""
    said: list[Sampled] = []
    memory = Memory(open_nvml, said.append)
    watching = asyncio.create_task(memory.watch())
    await memory.first(10.0)
    try:
        yield memory, said
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await memory.close()


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 10 s")


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_counts_as_measured_until_nvml_is_back(
    nvml: Callable[[str], None], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    async def body() -> None:
        nvml(GPU)
        async with watched() as (memory, said):
            assert memory.used(FIRST) == 5 * GIB
            assert memory.held_by({17}, FIRST) == 3 * GIB
            nvml(f"{GPU}{fault}\n")
            assert not await memory.sample()
            assert list(said[-1].gpus) == []
            assert said[-1].problem == memory.problem != ""
            assert [(gpu.total_bytes, gpu.used_bytes) for gpu in memory.gpus] == [(24 * GIB, None)]
            assert memory.used(FIRST) is None
            assert memory.held_by({17}, FIRST) == 0
            nvml(GPU.replace(str(5 * GIB), str(7 * GIB)))
            await until(lambda: not memory.problem)
            assert memory.used(FIRST) == 7 * GIB
            assert said[-1].gpus[0].used_bytes == 7 * GIB

    with caplog.at_level(logging.INFO, "mmd.gateway.memory"):
        asyncio.run(body())
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("the GPUs cannot be read, so until they can what was last known of them counts: ")
    assert last == "the GPUs can be read again"


def test_nobody_waits_for_a_driver_that_hangs_but_the_first(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(GPU)
        async with watched() as (memory, _):
            nvml(f"{GPU}hang\n")
            assert await memory.measure(FIRST) is None
            began = time.monotonic()
            assert await memory.measure(FIRST) is None
            await memory.settle(FIRST, 5 * GIB)
            assert await memory.wait_freed(FIRST, 5 * GIB, GIB) is None
            assert time.monotonic() - began < 0.2, "each try would have taken half a second"

    asyncio.run(body())


def test_those_that_wait_while_a_failure_is_found_out_fail_with_it(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(GPU)
        async with watched() as (memory, said):
            nvml(f"{GPU}hang\n")
            began = time.monotonic()
            assert await asyncio.gather(*(memory.measure(FIRST) for _ in range(5))) == [None] * 5
            assert time.monotonic() - began < 1.0
            assert len([sampled for sampled in said if sampled.problem]) == 1

    asyncio.run(body())


def test_a_memory_that_cannot_be_read_from_the_start(nvml: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        nvml("init 18\n")
        async with watched() as (memory, said):
            assert said == [Sampled((), memory.problem)]
            assert len(memory.gpus) == 0
            nvml(GPU)
            await until(lambda: memory.gpus)
            assert said[-1].gpus[0].total_bytes == 24 * GIB

    asyncio.run(body())
    assert "models that need one cannot start: NVML: RM has detected an NVML/RM version mismatch." in caplog.text


def test_a_first_look_is_not_waited_for_longer_than_said(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(f"{GPU}hang\n")
        said: list[Sampled] = []
        memory = Memory(open_nvml, said.append)
        watching = asyncio.create_task(memory.watch())
        began = time.monotonic()
        await memory.first(0.1)
        assert 0.1 <= time.monotonic() - began < 0.5
        assert said == []
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await memory.close()

    asyncio.run(body())


def test_a_configuration_that_names_other_gpus_is_tried_at_once_during_a_failure(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(GPU)
        wanted: list[int | str] = [3]

        async def open_wanted() -> GpuProvider:
            devices = tuple(Device(selector=selector) for selector in wanted)
            return NvmlProvider(Gpus(provider=Provider.NVML, devices=devices))

        memory = Memory(open_wanted, lambda _: None)
        assert not await memory.sample()
        assert memory.problem == "gpus.devices: no GPU '3' among 1 (nvidia-smi)"
        wanted[:] = [0]
        await memory.reopen()
        assert memory.used(FIRST) == 5 * GIB
        await memory.close()

    asyncio.run(body())


def test_an_error_of_a_provider_that_cannot_be_opened_is_a_problem() -> None:
    async def body() -> None:
        async def fail() -> GpuProvider:
            raise MmdError("no such thing", hint="look")

        memory = Memory(fail, lambda _: None)
        assert not await memory.sample()
        assert memory.problem == "no such thing (look)"

    asyncio.run(body())
