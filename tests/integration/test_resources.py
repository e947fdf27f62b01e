"""Named resources that a command tells, and the host's memory as it is: the real gateway in its sandbox, real commands."""

import json
import mmap
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from client import Answer, chat
from testbed import Installation

_GIB = 1 << 30
_ADMIN = "http://localhost/api/v1/models"
_MODELS = """
gateway: {wait_limit: WAIT_LIMIT}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s, max_wait: 1s}
resources: {scratch: {command: [/usr/local/bin/scratch-free, "$(reboot)"], interval: 100ms}}
defaults: {engine: sim, sim: {load_time: 200ms, tokens_per_second: 500}}
models:
  one: {vram: 2GiB, resources: {scratch: 1}}
  two: {vram: 2GiB, resources: {scratch: 1}}
  other: {vram: 2GiB}
"""
_COMMAND = "/usr/local/bin/scratch-free"
# What there is, less what the running models have really taken: each has its control group from its start to its end.
_TELLS = """#!/bin/sh
[ "$1" = '$(reboot)' ] || exit 1
taken=$(find /sys/fs/cgroup -type d | grep -cE '/mmd-model-(one|two)@')
echo $(( $(cat /etc/scratch-total) - taken ))
"""
_HANGS = "#!/bin/sh\nsleep 86399\n"
_FAILS = "#!/bin/sh\necho the disk has gone >&2\nexit 7\n"


@pytest.fixture(scope="module")
def machine(installed: Installation) -> Iterator[Installation]:
    installed.write(_COMMAND, _TELLS, mode=0o755)
    installed.write("/etc/scratch-total", "1\n")
    configure(installed)
    yield installed
    installed.stop_all()


def configure(machine: Installation, *, wait_limit: str = "1min", provider: str = "sim", more: str = "") -> None:
    models = _MODELS.replace("WAIT_LIMIT", wait_limit).replace("provider: sim", f"provider: {provider}")
    machine.configure(models + more)


def resource(machine: Installation, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in machine.status()["resources"] if each["name"] == name)
    return found


def up(machine: Installation) -> list[str]:
    return sorted(model["name"] for model in machine.status()["models"] if model["state"] == "ready")


@contextmanager
def asking(model: str) -> Iterator["Future[Answer]"]:
    """One request, answered or not."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(chat, model)


def test_with_one_free_only_one_is_up(machine: Installation) -> None:
    assert chat("one").status == 200
    assert chat("two").status == 200
    assert up(machine) == ["two"]
    machine.wait_until(lambda: resource(machine, "scratch")["budget"] == 1, 5)
    assert resource(machine, "scratch") == {
        "name": "scratch", "budget": 1, "reserved": 1, "free": 0, "in_bytes": False, "problem": "",
    }  # fmt: skip
    shown = re.sub(" +", " ", machine.ctl("status").stdout)
    assert "scratch ████████████████████ 1 / 1 0 free" in shown


def test_more_of_it_lets_both(machine: Installation) -> None:
    machine.write("/etc/scratch-total", "2\n")
    machine.wait_until(lambda: resource(machine, "scratch")["free"] == 1, 5)
    assert chat("one").status == 200
    assert up(machine) == ["one", "two"]
    machine.wait_until(lambda: resource(machine, "scratch")["free"] == 0, 5)
    time.sleep(0.5)
    assert resource(machine, "scratch")["budget"] == 2, "what they have taken is not counted twice"


def test_a_command_that_fails_holds_up_nobody(machine: Installation) -> None:
    machine.write(_COMMAND, _FAILS, mode=0o755)
    machine.wait_until(lambda: resource(machine, "scratch")["problem"], 5)
    problem = f"{_COMMAND}: exit status 7: the disk has gone; what it told last stays in force"
    assert resource(machine, "scratch") == {
        "name": "scratch", "budget": 2, "reserved": 2, "free": 0, "in_bytes": False, "problem": problem,
    }  # fmt: skip
    assert f"  resource scratch: {problem}\n" in machine.ctl("status").stdout
    machine.ctl("stop", "one")
    assert chat("one").status == 200
    time.sleep(0.5)
    assert machine.journal("-u", "mmd-gateway.service").count("the disk has gone") == 1
    machine.write(_COMMAND, _TELLS, mode=0o755)
    machine.wait_until(lambda: not resource(machine, "scratch")["problem"], 5)
    assert "resource scratch: its gauge works again" in machine.journal("-u", "mmd-gateway.service")


def test_a_command_that_hangs_holds_up_nobody_and_is_ended(machine: Installation) -> None:
    machine.write(_COMMAND, _HANGS, mode=0o755)
    machine.wait_until(lambda: "sleep 86399" in machine.ps(), 5)
    machine.ctl("stop", "one")
    for name in ("one", "two", "other"):
        began = time.monotonic()
        assert chat(name).status == 200
        assert time.monotonic() - began < 3
    machine.wait_until(lambda: "no answer within 5.0 s; what" in resource(machine, "scratch")["problem"], 15)
    assert machine.ps().count("sleep 86399") <= 1
    machine.systemctl("stop", "mmd-gateway.service")
    assert "sleep 86399" not in machine.ps()


def test_before_the_first_value_only_who_needs_it_waits_and_not_for_ever(machine: Installation) -> None:
    """The next gateway has heard nothing yet, and never will. What runs is adopted and serves; who is stopped waits for 5 s."""
    assert [chat(name).status for name in ("one", "two", "other")] == [200, 200, 200]
    machine.ctl("stop", "one")
    machine.systemctl("restart", "mmd-gateway.service")
    began = time.monotonic()
    with asking("one") as answer:
        assert [chat(name).status for name in ("two", "other")] == [200, 200]
        assert time.monotonic() - began < 4
        assert not answer.done()
        assert "it has not told yet" in resource(machine, "scratch")["problem"]
        assert answer.result(30).status == 200
    assert 4 < time.monotonic() - began < 12
    assert "until it tells, it limits nothing" in resource(machine, "scratch")["problem"]
    assert resource(machine, "scratch")["budget"] is None
    machine.write(_COMMAND, _TELLS, mode=0o755)
    machine.wait_until(lambda: resource(machine, "scratch")["budget"] == 2, 10)


def test_who_waits_in_vain_is_told_what_was_short(machine: Installation) -> None:
    machine.write("/etc/scratch-total", "0\n")
    machine.ctl("stop", "--all")
    configure(machine, wait_limit="2s")
    machine.wait_until(lambda: resource(machine, "scratch")["budget"] == 0, 5)
    answer = chat("one")
    assert answer.status == 504
    assert answer.error["message"] == (
        "one did not become ready within 2.0 s (gateway.wait_limit): it needs 1 of scratch, of which 0 is free"
    )
    progress = machine.run(
        "curl", "--silent", "--unix-socket", "/run/mmd/admin.sock", "-X", "POST", f"{_ADMIN}/one/start"
    ).stdout
    assert "waiting: it needs 1 of scratch, of which 0 is free" in [
        json.loads(line)["message"] for line in progress.splitlines()
    ]


def test_a_model_without_its_resource_is_a_mistake_that_the_check_finds(machine: Installation) -> None:
    machine.write("/etc/mmd/models.d/lost.yaml", "models: {lost: {engine: sim, vram: 1GiB, resources: {scrach: 1}}}\n")
    done = machine.ctl("check", check=False)
    assert done.returncode == 1
    assert "models.lost.resources.scrach: no such resource (did you mean scratch?)" in done.stdout + done.stderr
    machine.path("/etc/mmd/models.d/lost.yaml").unlink()


def test_the_space_on_a_disk_as_the_manual_has_it(machine: Installation) -> None:
    """`df` prints a line above its number, and bytes without a unit; the model that needs a size makes sizes of them."""
    disk = '["df", "--output=avail", "--block-size=1", "/var/lib"]'
    configured = _MODELS.replace("WAIT_LIMIT", "1min").replace('[/usr/local/bin/scratch-free, "$(reboot)"]', disk)
    machine.configure(
        configured.replace("two: {vram: 2GiB, resources: {scratch: 1}}", "two: {vram: 2GiB, resources: {scratch: 8MiB}}")
    )
    assert chat("two").status == 200
    found = resource(machine, "scratch")
    free = int(machine.run("df", "--output=avail", "--block-size=1", "/var/lib").stdout.split()[-1])
    assert found["budget"] == pytest.approx(free, rel=0.1)
    assert (found["in_bytes"], found["reserved"], found["problem"]) == (True, 8 << 20, "")
    assert "0.0 / " in machine.ctl("status").stdout


@contextmanager
def hog(size_bytes: int) -> Iterator[None]:
    """Memory of the host that is really in use."""
    with mmap.mmap(-1, size_bytes) as memory:
        for offset in range(0, size_bytes, mmap.PAGESIZE):
            memory[offset] = 1
        yield


def test_ram_is_what_others_have_left(machine: Installation) -> None:
    """A model that the host could hold, and does not while somebody else uses it. What else the machine does takes and frees
    some as well, hence the distances. Static: simulated GPUs stand for a host without limits."""
    configure(machine, provider="static", more="  large: {vram: 2GiB, ram: 1GiB}\n")
    before = resource(machine, "ram")
    assert (before["in_bytes"], before["problem"], before["reserved"]) == (True, "", 0)
    with ThreadPoolExecutor(1) as pool:
        with hog(3 * _GIB):
            machine.wait_until(lambda: resource(machine, "ram")["free"] < before["free"] - 1.5 * _GIB, 10)
            configure(machine, provider="static", more=f"  large: {{vram: 2GiB, ram: {int(before['free']) - _GIB}B}}\n")
            answer = pool.submit(chat, "large")
            time.sleep(3)
            assert not answer.done()
            assert "large" not in up(machine)
        assert answer.result(30).status == 200
    assert resource(machine, "ram")["reserved"] == int(before["free"]) - _GIB
