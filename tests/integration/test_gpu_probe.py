"""GPUs through the sandboxed probe unit: the real pynvml over a fake libnvidia-ml.so.1, asked by a gateway without devices."""

from collections.abc import Iterator

import pytest
from client import chat
from fake_nvml import build_library, write_state
from testbed import Installation

_GIB = 1 << 30
_DROP_IN = """[Service]
Environment=LD_LIBRARY_PATH=/opt/fakenvml FAKE_NVML_STATE=/opt/fakenvml/state
"""
_MODELS = """
gpus: {provider: auto}
models:
  tiny: {engine: command, command: ["/bin/true"], vram: 10GiB}
  large: {engine: command, command: ["/bin/true"], vram: 23GiB}
"""


@pytest.fixture(scope="module")
def machine(installed: Installation) -> Iterator[Installation]:
    installed.path("/opt/fakenvml").mkdir(parents=True)
    build_library(installed.path("/opt/fakenvml"))
    installed.write("/etc/systemd/system/mmd-gpu-probe@.service.d/fake.conf", _DROP_IN)
    _use(installed, 0)
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


def _use(machine: Installation, gib: int) -> None:
    write_state(machine.path("/opt/fakenvml/state"), f"gpu GPU-fake {24 * _GIB} 0 {gib * _GIB}\n")


def test_the_gateway_sees_the_gpus_through_the_probe(machine: Installation) -> None:
    gpu = machine.status()["gpus"][0]
    assert gpu["uuid"] == "GPU-fake"
    assert gpu["total_bytes"] == 24 * _GIB
    assert gpu["budget_bytes"] == 23 * _GIB
    assert "mmd-gpu-probe@" in machine.systemctl("list-units", "--plain", "--no-legend", "mmd-gpu-probe@*")


def test_memory_that_others_use_leaves_the_budget(machine: Installation) -> None:
    _use(machine, 12)
    machine.wait_until(lambda: machine.status()["gpus"][0]["budget_bytes"] == 11 * _GIB, 10)
    _use(machine, 0)
    machine.wait_until(lambda: machine.status()["gpus"][0]["budget_bytes"] == 23 * _GIB, 10)


def test_a_killed_probe_is_asked_again(machine: Installation) -> None:
    machine.systemctl("kill", "--signal=KILL", "mmd-gpu-probe@*")
    _use(machine, 5)
    machine.wait_until(lambda: machine.status()["gpus"][0]["used_bytes"] == 5 * _GIB, 10)
    assert machine.status()["gateway"]["gpu_problem"] == ""
    _use(machine, 0)


def test_a_command_that_ends_at_once_is_said_to_have_done_so(machine: Installation) -> None:
    answer = chat("tiny")
    assert answer.status == 503
    assert "exited with status 0" in answer.error["message"]
