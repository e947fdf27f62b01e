"""GPU memory measured through NVML, from the driver's library to the eviction that follows from it.

Engines (gpu_engine.py) take and release memory: of the fake libnvidia-ml.so.1, which only the probe unit loads, and, with the
marker `gpu`, of a real GPU, where the same checks allow for what a CUDA context takes. Sizes are in units of 1/24 of the GPU.
"""

import fcntl
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from client import Answer, chat
from fake_nvml import build_library, write_state
from testbed import CHECKOUT, Installation

from mmd.quantity import format_size

_GIB = 1 << 30
_UNITS = 24
_CONTEXT_BYTES = _GIB
"""More than a CUDA context takes on any GPU so far, 0.3 to 0.7 GiB."""
_GRAIN_BYTES = 2 << 20
"""CUDA gives memory out in multiples of this."""

_ENGINE = "/opt/gpu_engine.py"
_PYTHON = "/usr/lib/mmd/bin/python"
_LIBRARY = "/opt/fakenvml"
_DIRECTORY = "/srv/gpu"
_STATE = f"{_DIRECTORY}/state"
_DROP_IN = f"[Service]\nSupplementaryGroups=mmd-model\nEnvironment=LD_LIBRARY_PATH={_LIBRARY} FAKE_NVML_STATE={_STATE}\n"
_ONE_GPU = f"gpu GPU-aa {_UNITS * _GIB} 0 0\n"
_DIVIDED = f"""gpu GPU-aa {_UNITS * _GIB} 0 0 mig
slice 0/0 MIG-a0 7 {12 * _GIB} 0 0
slice 0/1 MIG-a1 9 {10 * _GIB} 0 0
"""


@dataclass(frozen=True)
class Machine:
    """A testbed with one GPU."""

    testbed: Installation
    real: bool
    total_bytes: int

    def bytes(self, units: int) -> int:
        return units * (self.total_bytes // _UNITS // _GRAIN_BYTES * _GRAIN_BYTES)

    def agrees(self, measured: int | None, units: int, *, contexts: int = 1) -> bool:
        """Whether this is the memory of `units`, held by so many processes with a CUDA context each."""
        return measured is not None and 0 <= measured - self.bytes(units) <= contexts * _CONTEXT_BYTES * self.real

    def configure(self, models: str, *, provider: str = "nvml", variables: str = "") -> None:
        fake = "" if self.real else f"FAKE_NVML_STATE: {_STATE}"
        environment = ", ".join(word for word in (fake, variables) if word)
        self.testbed.configure(
            f"gpus: {{provider: {provider}, devices: [0]}}\npolicy: {{min_residency: 0s}}\n"
            f"defaults: {{engine: command, workdir: {_DIRECTORY}, env: {{{environment}}}}}\nmodels:\n{models}"
        )

    def model(self, name: str, declared: int, held: int, *, more: str = "", wrap: Sequence[str] = ()) -> str:
        """A model that declares so many units and holds so many."""
        command = [*wrap, _PYTHON, "-I", _ENGINE, "--port", "{port}", "--hold", str(self.bytes(held))]
        return f"  {name}: {{command: {command}, vram: {format_size(self.bytes(declared))}{more}}}\n"

    def set_state(self, change: Callable[[str], str]) -> None:
        """Changes the fake GPU, under the lock that the engines take as well."""
        file = self.testbed.path(_STATE)
        with self.testbed.path(f"{_DIRECTORY}/state.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_state(file, change(file.read_text()))

    def fail(self, fault: str) -> None:
        self.set_state(lambda text: f"{text}{fault}\n")

    def heal(self) -> None:
        self.set_state(lambda text: "".join(f"{line}\n" for line in text.splitlines() if len(line.split()) > 2))

    @property
    def gpu(self) -> dict[str, Any]:
        gpu: dict[str, Any] = self.testbed.status()["gpus"][0]
        return gpu

    def show(self, name: str) -> dict[str, Any]:
        return next(model for model in self.testbed.status()["models"] if model["name"] == name)

    def holds(self, name: str) -> int:
        """What the model's instance is reckoned with, 0 when it does not run."""
        return max((instance["vram_bytes"] for instance in self.show(name)["instances"]), default=0)

    def problem(self) -> str:
        problem: str = self.testbed.status()["gateway"]["gpu_problem"]
        return problem

    def tells_processes(self) -> bool:
        """Whether the driver counts processes as this PID namespace does."""
        with self.outsider(1) as pid:
            variables = {} if self.real else {"LD_LIBRARY_PATH": _LIBRARY, "FAKE_NVML_STATE": _STATE}
            answer = self.testbed.run(_PYTHON, "-I", "-m", "mmd.gpu.probe", "--once", env=variables).stdout
        return str(pid) in json.loads(answer)["gpus"][0]["by_pid"]

    @contextmanager
    def outsider(self, units: int) -> Iterator[int]:
        """A program that mmd knows nothing of; its PID."""
        variables = [] if self.real else [f"FAKE_NVML_STATE={_STATE}"]
        command = ["env", *variables, _PYTHON, "-I", _ENGINE, "--hold", str(self.bytes(units))]
        enter = [str(CHECKOUT / "packaging/lib/testbed"), "enter", self.testbed.name]
        with subprocess.Popen([*enter, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                said = process.stdout.readline()
                assert said.startswith("holding as "), said
                yield int(said.split()[-1])
            finally:
                process.stdin.close()


def _install_fake(testbed: Installation) -> None:
    library = testbed.path(_LIBRARY)
    library.mkdir(parents=True)
    build_library(library)
    testbed.write("/etc/systemd/system/mmd-gpu-probe@.service.d/fake.conf", _DROP_IN)
    # A working directory is for reading only (mmd.sandbox): what engines need besides, a drop-in gives, here for all of them.
    testbed.write("/etc/systemd/system/mmd-model-.service.d/fake.conf", f"[Service]\nReadWritePaths={_DIRECTORY}\n")
    testbed.write(_STATE, _ONE_GPU)
    testbed.write(f"{_DIRECTORY}/state.lock", "", 0o666)


def _real_total(testbed: Installation) -> int:
    text = testbed.run(
        "nvidia-smi", "--query-gpu=memory.total,memory.reserved", "--format=csv,noheader,nounits", "--id=0"
    ).stdout
    total_mib, reserved_mib = map(int, text.split(","))
    return (total_mib - reserved_mib) << 20


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, installed: Installation) -> Iterator[Machine]:
    real = request.param == "real"
    if real and not Path("/dev/nvidiactl").exists():
        pytest.skip("no NVIDIA driver here")
    installed.write(_ENGINE, (CHECKOUT / "tests/integration/gpu_engine.py").read_text())
    installed.path(_DIRECTORY).mkdir(parents=True)
    if not real:
        _install_fake(installed)
    installed.run("chgrp", "-R", "mmd-model", _DIRECTORY)  # each engine has a user of its own, all have this group
    installed.path(_DIRECTORY).chmod(0o2777)
    machine = Machine(installed, real, _real_total(installed) if real else _UNITS * _GIB)
    assert real or machine.tells_processes()
    yield machine
    installed.stop_all()
    drop_ins = [f"/etc/systemd/system/{unit}.service.d" for unit in ("mmd-gpu-probe@", "mmd-model-")]
    installed.run("rm", "-rf", _DIRECTORY, *drop_ins)
    installed.systemctl("daemon-reload")


@pytest.fixture
def fake(machine: Machine) -> Iterator[Machine]:
    """A GPU of which everything may be changed; it is whole and in order again afterwards."""
    if machine.real:
        pytest.skip("a real GPU stays as it is")
    yield machine
    machine.testbed.stop_all()
    machine.set_state(lambda _: _ONE_GPU)


@pytest.fixture
def two_models(machine: Machine) -> Iterator[Machine]:
    """By what they declare they fit side by side, by what they hold they do not. The second one's memory is its child's."""
    if not machine.tells_processes():
        pytest.skip("this driver counts processes by another PID namespace than the testbed's")
    in_a_child = ("/bin/sh", "-c", '"$@" & wait', "sh")
    models = machine.model("first", 8, 13) + machine.model("second", 12, 12, wrap=in_a_child) + machine.model("third", 8, 8)
    machine.configure(models)
    yield machine
    machine.testbed.stop_all()
    machine.testbed.run("rm", "-f", "/var/lib/mmd/lessons.sqlite")


def _said(answer: Answer) -> str:
    assert answer.status == 200, answer.text
    said: str = answer.json["choices"][0]["message"]["content"]
    return said


def test_totals_and_foreign_use(machine: Machine) -> None:
    machine.configure(machine.model("first", 8, 8))
    before = machine.gpu
    assert abs(before["total_bytes"] - machine.total_bytes) <= _CONTEXT_BYTES * machine.real
    assert before["budget_bytes"] == before["total_bytes"] - _GIB - before["used_bytes"]
    with machine.outsider(4):
        machine.testbed.wait_until(lambda: machine.agrees(machine.gpu["used_bytes"] - before["used_bytes"], 4))
        machine.testbed.wait_until(lambda: machine.agrees(before["budget_bytes"] - machine.gpu["budget_bytes"], 4))
    machine.testbed.wait_until(lambda: machine.gpu["budget_bytes"] == before["budget_bytes"], what="the outsider has gone")


def test_what_a_unit_holds_is_learned_and_is_no_foreign_use(two_models: Machine) -> None:
    budget = two_models.gpu["budget_bytes"]
    for name, units in (("first", 13), ("second", 12)):
        assert chat(name).status == 200
        two_models.testbed.wait_until(lambda name=name, units=units: two_models.agrees(two_models.holds(name), units))  # type: ignore[misc]
        assert two_models.agrees(two_models.show(name)["reckoning"]["measured_bytes"], units)
        assert two_models.gpu["budget_bytes"] == budget
        two_models.testbed.ctl("stop", name)
        two_models.testbed.wait_until(lambda: two_models.gpu["budget_bytes"] == budget)


def test_what_is_measured_decides_who_must_leave(two_models: Machine) -> None:
    assert chat("first").status == 200
    assert two_models.agrees(two_models.holds("first"), 13)
    assert chat("second").status == 200
    assert two_models.show("first")["state"] == "stopped", "8 + 12 units would have fitted, 13 + 12 do not"
    assert "out of memory" not in two_models.testbed.journal("MMD_ROLE=model").lower()


def test_foreign_use_makes_a_model_leave(two_models: Machine) -> None:
    assert chat("second").status == 200
    budget = two_models.gpu["budget_bytes"]
    with two_models.outsider(6):
        two_models.testbed.wait_until(lambda: two_models.gpu["budget_bytes"] < budget)
        assert chat("third").status == 200
        assert two_models.show("second")["state"] == "stopped", "12 + 8 units fit, but not beside 6 of somebody else's"


def test_a_model_that_grows_is_somebody_elses_until_it_is_measured(two_models: Machine) -> None:
    assert chat("third").status == 200
    before = two_models.gpu["budget_bytes"]
    assert _said(chat("third", f"hold {two_models.bytes(10)}")).startswith(str(two_models.bytes(10)))
    two_models.testbed.wait_until(lambda: before - two_models.gpu["budget_bytes"] == two_models.bytes(2))
    _said(chat("third", f"hold {two_models.bytes(8)}"))
    two_models.testbed.wait_until(lambda: two_models.gpu["budget_bytes"] == before)


def test_models_on_the_slices_of_a_divided_gpu(fake: Machine) -> None:
    fake.set_state(lambda _: _DIVIDED)
    models = (
        fake.model("large", 10, 10)
        + fake.model("small", 8, 8)
        + fake.model("named", 2, 2, more=", gpus: [MIG-a1]")
        + fake.model("pair", 4, 4, more=", gpus: 2")
    )
    # The runner asks the driver for the slice's UUID, so it needs the library as well.
    fake.configure(models, variables=f"LD_LIBRARY_PATH: {_LIBRARY}")
    gpus = fake.testbed.status()["gpus"]
    assert [(gpu["index"], gpu["uuid"], gpu["budget_bytes"]) for gpu in gpus] == [
        (100, "MIG-a0", 11 * _GIB),
        (101, "MIG-a1", 9 * _GIB),
    ]
    assert _said(chat("small")) == f"{8 * _GIB} on MIG-a1", "the fullest that fits"
    assert _said(chat("large")) == f"{10 * _GIB} on MIG-a0"
    assert fake.testbed.show("mmd-model-large@100.service", "ActiveState") == "active"
    assert fake.testbed.show("mmd-model-small@101.service", "ActiveState") == "active"
    assert [gpu["used_bytes"] for gpu in fake.testbed.status()["gpus"]] == [10 * _GIB, 8 * _GIB]
    assert fake.show("large")["reckoning"]["measured_bytes"] == 10 * _GIB
    assert _said(chat("named")) == f"{2 * _GIB} on MIG-a1"
    assert fake.show("small")["state"] == "stopped"
    answer = chat("pair")
    assert answer.status == 503
    assert "2 slices of divided GPUs (MIG), of which a process can use no more than one" in answer.error["message"]


def _said_of_gpus(machine: Machine) -> list[str]:
    """What the gateway has said of the GPUs in its journal."""
    return [line for line in machine.testbed.journal("-u", "mmd-gateway.service").splitlines() if "the GPUs can" in line]


@pytest.mark.parametrize("fault", ["init 18", "hang"])
def test_decisions_go_on_while_nvml_fails(fake: Machine, two_models: Machine, fault: str) -> None:
    sleeper = f"  sleeper: {{engine: sim, vram: 2GiB, args: [--gpu-memory, '0={_UNITS * _GIB}']}}\n"
    fake.configure(fake.model("first", 8, 13) + fake.model("second", 12, 12) + fake.model("third", 8, 8) + sleeper)
    testbed = fake.testbed
    with fake.outsider(4):
        assert chat("first").status == 200
        testbed.wait_until(lambda: fake.gpu["budget_bytes"] == 19 * _GIB)
        before = len(_said_of_gpus(fake))
        fake.fail(fault)
        testbed.wait_until(fake.problem, 20)
    assert chat("first").status == 200
    assert fake.gpu["used_bytes"] is None
    assert fake.gpu["budget_bytes"] == 19 * _GIB, "what others held is not forgotten, although it has gone"
    assert f"GPUs: they cannot be read: {fake.problem()}" in testbed.ctl("status").stdout
    assert chat("second").status == 200, "NVML is not needed to start a model"
    assert fake.show("first")["state"] == "stopped", "its size is remembered"
    assert chat("sleeper").status == 200
    assert "slept in" in testbed.ctl("sleep", "sleeper").stdout, "nothing can tell whether its memory came back"
    assert fake.show("sleeper")["state"] == "sleeping"
    assert chat("sleeper").status == 200
    fake.heal()
    testbed.wait_until(lambda: not fake.problem(), 40)
    testbed.wait_until(lambda: fake.gpu["used_bytes"] == 12 * _GIB)
    testbed.wait_until(lambda: fake.gpu["budget_bytes"] == 23 * _GIB)
    assert _said_of_gpus(fake)[before:] == [
        f"the GPUs cannot be read, so until they can what was last known of them counts: {_cause(fault)}",
        "the GPUs can be read again",
    ]


def _cause(fault: str) -> str:
    causes = {
        "init 18": "NVML: RM has detected an NVML/RM version mismatch. (nvidia-smi)",
        "hang": "the GPU probe did not answer within 5 s (nvidia-smi)",
    }
    return causes[fault]


@pytest.mark.parametrize("provider", ["nvml", "auto"])
def test_a_gateway_that_starts_while_nvml_fails_serves_what_runs(fake: Machine, provider: str) -> None:
    fake.configure(fake.model("first", 8, 8) + fake.model("second", 8, 8), provider=provider)
    assert chat("first").status == 200
    fake.fail("init 18")
    fake.testbed.systemctl("restart", "mmd-gateway.service")
    assert chat("first").status == 200
    answer = chat("second")
    assert (answer.status, answer.error["code"]) == (503, "gpus_unreadable")
    assert "second needs 1 GPU, and the GPUs cannot be read: NVML: RM has detected an NVML/RM" in answer.error["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert "models that need one cannot start" in fake.testbed.ctl("status").stdout
    fake.heal()
    fake.testbed.wait_until(lambda: not fake.problem(), 40)
    assert chat("second").status == 200
    assert fake.show("first")["state"] == "ready"


def test_a_gateway_that_starts_while_nvml_hangs_serves_what_runs_at_once(fake: Machine) -> None:
    fake.configure(fake.model("first", 8, 8) + fake.model("second", 8, 8))
    assert chat("first").status == 200
    fake.fail("hang")
    fake.testbed.systemctl("restart", "mmd-gateway.service", timeout_s=10)
    assert chat("first", timeout_s=5).status == 200
    with ThreadPoolExecutor() as threads:
        second = threads.submit(chat, "second")
        fake.testbed.wait_until(lambda: fake.show("second")["waiting"] == 1, what="for the first look at the GPUs")
        fake.heal()
        assert second.result().status == 200
