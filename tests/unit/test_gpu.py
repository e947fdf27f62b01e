"""GPU providers: declared, simulated, and NVML through the real pynvml over a fake libnvidia-ml.so.1."""

import asyncio
import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from mmd.config import Device, Gpus, Provider
from mmd.errors import MmdError
from mmd.gpu import GpuMemory, open_provider
from mmd.gpu.nvml import NoDriverError, NvmlProvider
from mmd.gpu.probe import has_hardware
from mmd.sim.ledger import Ledger

GIB = 1 << 30
TWO_GPUS = f"gpu GPU-aa {24 * GIB} {GIB} {5 * GIB}\ngpu GPU-bb {80 * GIB} {GIB} 0\nprocess 0 17 {3 * GIB}\nprocess 0 18 {GIB}\n"

# GPU 0 is divided: two slices, of which the second has two compute instances, and a gap between them. GPU 1 is whole.
DIVIDED = f"""gpu GPU-aa {40 * GIB} {GIB} {9 * GIB} mig
gpu GPU-bb {80 * GIB} {GIB} 0
slice 0/0 MIG-a0 7 {10 * GIB} 0 {GIB}
slice 0/2 MIG-a2 9 {20 * GIB} 0 {8 * GIB}
slice 0/3 MIG-a3 9 {20 * GIB} 0 {8 * GIB}
process 0/0 17 {GIB}
process 0/2 18 {5 * GIB}
process 0/3 19 {3 * GIB}
"""


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


async def sample_once(gpus: Gpus, sim_dir: Path) -> tuple[GpuMemory, ...]:
    provider = await open_provider(gpus, sim_dir)
    try:
        return await provider.sample()
    finally:
        await provider.close()


def nvml_gpus(*selectors: int | str) -> Gpus:
    return Gpus(provider=Provider.NVML, devices=tuple(Device(selector=selector) for selector in selectors))


def test_static(tmp_path: Path) -> None:
    async def body() -> None:
        devices = (Device(memory_bytes=24 * GIB), Device(memory_bytes=48 * GIB))
        provider = await open_provider(Gpus(provider=Provider.STATIC, devices=devices), tmp_path)
        assert not provider.measures
        gpus = await provider.sample()
        assert [(gpu.index, gpu.total_bytes, gpu.used_bytes) for gpu in gpus] == [(0, 24 * GIB, None), (1, 48 * GIB, None)]
        await provider.close()

    run(body)


@pytest.mark.parametrize("provider", [Provider.STATIC, Provider.SIM])
def test_declared_gpus_need_their_memory(tmp_path: Path, provider: Provider) -> None:
    async def body() -> None:
        with pytest.raises(MmdError, match=r"gpus.devices\[1\].*needs the memory"):
            await open_provider(Gpus(provider=provider, devices=(Device(memory_bytes=GIB), Device(selector=1))), tmp_path)

    run(body)


def test_sim_shows_the_ledger(tmp_path: Path) -> None:
    async def body() -> None:
        devices = (Device(memory_bytes=24 * GIB), Device(memory_bytes=24 * GIB))
        provider = await open_provider(Gpus(provider=Provider.SIM, devices=devices), tmp_path)
        assert provider.measures
        assert [gpu.used_bytes for gpu in await provider.sample()] == [0, 0]
        claim = Ledger(tmp_path).claim(6 * GIB, owner="m", totals={1: 24 * GIB})
        empty, used = await provider.sample()
        assert (empty.used_bytes, dict(empty.by_pid)) == (0, {})
        assert (used.used_bytes, dict(used.by_pid)) == (6 * GIB, {os.getpid(): 6 * GIB})
        claim.release()
        assert [gpu.used_bytes for gpu in await provider.sample()] == [0, 0]
        await provider.close()

    run(body)


def test_nvml_sample(nvml: Callable[[str], None], tmp_path: Path) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        provider = await open_provider(nvml_gpus(), tmp_path)
        assert provider.measures
        first, second = await provider.sample()
        assert first == GpuMemory(0, "GPU-aa", "Fake GPU", 23 * GIB, 5 * GIB, {17: 3 * GIB, 18: GIB})
        assert second == GpuMemory(1, "GPU-bb", "Fake GPU", 79 * GIB, 0, {})
        nvml(TWO_GPUS.replace(str(5 * GIB), str(6 * GIB)))
        assert (await provider.sample())[0].used_bytes == 6 * GIB
        await provider.close()

    run(body)


def test_nvml_selectors(nvml: Callable[[str], None], tmp_path: Path) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        assert [gpu.index for gpu in await sample_once(nvml_gpus("GPU-bb"), tmp_path)] == [1]
        assert [gpu.index for gpu in await sample_once(nvml_gpus(1, "GPU-aa"), tmp_path)] == [0, 1]
        for selector in (7, "GPU-zz"):
            with pytest.raises(MmdError, match=f"no GPU '{selector}' among 2"):
                await sample_once(nvml_gpus(selector), tmp_path)

    run(body)


def test_nvml_unknown_process_memory_makes_by_pid_empty(nvml: Callable[[str], None], tmp_path: Path) -> None:
    async def body() -> None:
        nvml(f"{TWO_GPUS}process 0 19 unknown\n")
        first, _ = await sample_once(nvml_gpus(), tmp_path)
        assert (first.used_bytes, dict(first.by_pid)) == (5 * GIB, {})

    run(body)


def test_nvml_old_driver(nvml: Callable[[str], None], tmp_path: Path) -> None:
    async def body() -> None:
        nvml(f"{TWO_GPUS}version1\n")
        first, _ = await sample_once(nvml_gpus(), tmp_path)
        assert (first.total_bytes, first.used_bytes) == (24 * GIB, 6 * GIB)

    run(body)


def test_slices_stand_in_for_a_divided_gpu(nvml: Callable[[str], None], tmp_path: Path) -> None:
    async def body() -> None:
        nvml(DIVIDED)
        whole, first, second = await sample_once(nvml_gpus(), tmp_path)
        assert whole == GpuMemory(1, "GPU-bb", "Fake GPU", 79 * GIB, 0, {})
        assert first == GpuMemory(100, "MIG-a0", "Fake GPU", 10 * GIB, GIB, {17: GIB}, "GPU-aa")
        assert second == GpuMemory(102, "MIG-a2", "Fake GPU", 20 * GIB, 8 * GIB, {18: 5 * GIB}, "GPU-aa")

    run(body)


@pytest.mark.parametrize(
    ("selectors", "found"),
    [
        ((0,), [100, 102]),
        (("GPU-aa",), [100, 102]),
        ((1, "MIG-a2"), [1, 102]),
        ((100, "MIG-a0"), [100]),
        ((103,), [103]),
        (("GPU-aa", 103), [100, 102]),  # 103 has the memory of 102
    ],
)
def test_selectors_of_slices(
    nvml: Callable[[str], None], tmp_path: Path, selectors: tuple[int | str, ...], found: list[int]
) -> None:
    async def body() -> None:
        nvml(DIVIDED)
        assert [gpu.index for gpu in await sample_once(nvml_gpus(*selectors), tmp_path)] == found

    run(body)


@pytest.mark.parametrize("selector", [101, 200, 300, "MIG-zz"])
def test_slices_that_there_are_not(nvml: Callable[[str], None], tmp_path: Path, selector: int | str) -> None:
    async def body() -> None:
        nvml(DIVIDED)
        with pytest.raises(MmdError, match=f"no GPU '{selector}' among 2"):
            await sample_once(nvml_gpus(selector), tmp_path)

    run(body)


def test_a_failure_that_lasts_as_long_as_the_process_is_over_with_the_next(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        provider = NvmlProvider(nvml_gpus())
        await provider.sample()
        nvml(f"{TWO_GPUS}stale\n")
        with pytest.raises(MmdError, match=r"(?i)version mismatch"):
            await provider.sample()
        nvml(TWO_GPUS)
        assert len(await provider.sample()) == 2
        await provider.close()

    run(body)


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [("0x10de", "0x030200", True), ("0x10de", "0x030000", True), ("0x10de", "0x040300", False), ("0x8086", "0x030000", False)],
)
def test_hardware_without_a_driver(tmp_path: Path, vendor: str, kind: str, expected: bool) -> None:
    device = tmp_path / "0000:01:00.0"
    assert not has_hardware(tmp_path)
    device.mkdir()
    assert not has_hardware(tmp_path), "it has just been unplugged"
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert has_hardware(tmp_path) is expected


def test_auto_measures_where_there_is_a_driver(nvml: Callable[[str], None], tmp_path: Path) -> None:
    if has_hardware():
        pytest.skip("this machine has a GPU")

    async def body() -> None:
        nvml(TWO_GPUS)
        assert len(await sample_once(Gpus(), tmp_path)) == 2
        nvml("init 9\n")
        with pytest.raises(NoDriverError, match=r"(?i)driver not loaded"):
            await sample_once(nvml_gpus(), tmp_path)
        assert await sample_once(Gpus(), tmp_path) == ()
        nvml("init 999\n")
        with pytest.raises(MmdError) as caught:
            await sample_once(Gpus(), tmp_path)
        assert not isinstance(caught.value, NoDriverError), "a broken driver is not the absence of one"

    run(body)


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if ctypes.util.find_library("nvidia-ml"):
        pytest.skip("this machine has a driver")

    async def body() -> None:
        with pytest.raises(NoDriverError, match="install the NVIDIA driver"):
            await sample_once(nvml_gpus(), tmp_path)
        assert await sample_once(Gpus(), tmp_path) == ()

    run(body)


@pytest.mark.parametrize(("fault", "words"), [("hang", "did not answer within"), ("crash", "ended with status 42")])
def test_a_failing_probe_is_an_error_within_a_bound_and_is_replaced(
    nvml: Callable[[str], None], fault: str, words: str
) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        provider = NvmlProvider(nvml_gpus(), timeout_s=0.3)
        assert len(await provider.sample()) == 2
        nvml(f"{TWO_GPUS}{fault}\n")
        started = time.monotonic()
        with pytest.raises(MmdError, match=words):
            await provider.sample()
        assert time.monotonic() - started < 3
        nvml(TWO_GPUS)
        assert len(await provider.sample()) == 2
        await provider.close()

    run(body)


def test_a_cancelled_sample_does_not_spoil_the_next(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        provider = NvmlProvider(nvml_gpus())
        await provider.sample()
        nvml(f"{TWO_GPUS}hang\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await provider.sample()
        nvml(f"gpu GPU-cc {GIB} 0 0\n")
        assert [gpu.uuid for gpu in await provider.sample()] == ["GPU-cc"]
        await provider.close()

    run(body)


def test_sampling_never_blocks_the_loop(nvml: Callable[[str], None]) -> None:
    async def body() -> None:
        nvml(TWO_GPUS)
        provider = NvmlProvider(nvml_gpus(), timeout_s=0.5)
        await provider.sample()
        nvml(f"{TWO_GPUS}hang\n")
        sampling = asyncio.ensure_future(provider.sample())
        worst_s, before = 0.0, time.monotonic()
        while not sampling.done():
            await asyncio.sleep(0.005)
            worst_s, before = max(worst_s, time.monotonic() - before), time.monotonic()
        with pytest.raises(MmdError):
            await sampling
        assert worst_s < 0.25
        await provider.close()

    run(body)


def test_the_probe_dies_with_its_parent_even_while_it_hangs(nvml: Callable[[str], None]) -> None:
    nvml(TWO_GPUS)
    code = (
        "import asyncio\nfrom mmd.config import Gpus\nfrom mmd.gpu.nvml import NvmlProvider\n"
        "async def main():\n"
        "    provider = NvmlProvider(Gpus())\n"
        "    await provider.sample()\n"
        "    print(provider._probe.process.pid, flush=True)\n"
        "    input()\n"
        "    await provider.sample()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        probe = int(parent.stdout.readline())
        nvml(f"{TWO_GPUS}hang\n")
        parent.stdin.write("\n")
        parent.stdin.flush()
        time.sleep(0.2)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while alive(probe) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(probe)


def test_a_probe_that_hangs_ends_by_itself(nvml: Callable[[str], None]) -> None:
    nvml(f"{TWO_GPUS}hang\n")
    command = [sys.executable, "-m", "mmd.gpu.probe", "--once", "--limit", "1"]
    done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, b"")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_probe_once(nvml: Callable[[str], None]) -> None:
    nvml(TWO_GPUS)
    done = subprocess.run([sys.executable, "-m", "mmd.gpu.probe", "--once"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert [gpu["total_bytes"] for gpu in answer["gpus"]] == [23 * GIB, 79 * GIB]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (TWO_GPUS, "0.2609"),  # 6 GiB of the smaller GPU's 23
        ("init 9\n", "the GPUs cannot be read: NVML: Driver Not Loaded"),
        (f"gpu GPU-aa {GIB} 0 0\n", "the memory of GPU 1 is not known"),
    ],
)
def test_the_runner_asks_nvml_for_the_vram_fraction(nvml: Callable[[str], None], tmp_path: Path, state: str, said: str) -> None:
    nvml(state)
    where = ("--model", "m", "--engine", "vllm", "--gpus", "0-1", "--definition", "x", "--directory", str(tmp_path / "m@0-1"))
    command = [sys.executable, "-m", "mmd.runner", *where, "--vram", str(6 * GIB), "--", "echo", "{vram_fraction}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ("102", "MIG-a2 MIG-a2 0.3000\n"),  # 6 GiB of the slice's 20
        ("1", "1 1 0.0759\n"),
        ("101", "there is no GPU 101: what it was divided into has changed"),
    ],
)
def test_an_engine_knows_a_slice_by_its_uuid(nvml: Callable[[str], None], tmp_path: Path, instance: str, said: str) -> None:
    nvml(DIVIDED)
    where = ("--gpus", instance, "--definition", "x", "--directory", str(tmp_path / f"m@{instance}"))
    tell = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES {gpus} {vram_fraction}")
    what = ("--model", "m", "--engine", "vllm", "--vram", str(6 * GIB))
    command = (sys.executable, "-m", "mmd.runner", *what, *where, "--", *tell)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert said in done.stdout + done.stderr
