"""The gateway's workers in a real systemd: as many as configured, replaced when killed, gone with the gateway."""

from collections.abc import Iterator, Set
from functools import partial

import pytest
from client import chat, stream
from testbed import Installation

_MODELS = """
gateway: {workers: COUNT}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
models:
  a: {engine: sim, vram: 14GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 200}}
  b: {engine: sim, vram: 16GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 200}}
"""
_GATEWAY = "mmd-gateway.service"


def _configuration(count: int) -> str:
    return _MODELS.replace("COUNT", str(count))


@pytest.fixture
def machine(installed: Installation) -> Iterator[Installation]:
    installed.configure(_configuration(2))
    assert chat("a").status == 200
    yield installed
    installed.stop_all()


def workers(machine: Installation) -> set[str]:
    return set(machine.run("pgrep", "--full", "mmd.gateway.workers", check=False).stdout.split())


def staffed(machine: Installation, count: int, *, besides: Set[str] = frozenset()) -> bool:
    now = workers(machine)
    return len(now) == count and now.isdisjoint(besides)


def another_gateway(machine: Installation, before: str) -> bool:
    return machine.show(_GATEWAY, "MainPID") != before


def test_a_changed_number_takes_effect_without_a_gap(machine: Installation) -> None:
    for count in (3, 1, 2):
        before = machine.show(_GATEWAY, "MainPID")
        running = iter(stream("a", max_tokens=200, ignore_eos=True))
        next(running)
        machine.write("/etc/mmd/mmd.yaml", _configuration(count))
        machine.ctl("reload")
        machine.wait_until(partial(another_gateway, machine, before), 30)
        assert machine.status()["gateway"]["workers"] == count
        assert "data: [DONE]" in list(running)
        assert chat("a").status == chat("b").status == 200
        machine.wait_until(partial(staffed, machine, 0 if count == 1 else count))


def test_a_changed_number_takes_effect_by_signal_as_well(machine: Installation) -> None:
    before = machine.show(_GATEWAY, "MainPID")
    machine.systemctl("stop", "mmd-reload.path")
    try:
        machine.write("/etc/mmd/mmd.yaml", _configuration(3))
        machine.systemctl("kill", "--kill-whom=main", "--signal=HUP", _GATEWAY)
        machine.wait_until(partial(another_gateway, machine, before), 30)
        machine.wait_until(partial(staffed, machine, 3))
    finally:
        machine.systemctl("start", "mmd-reload.path")


def test_killed_ones_are_replaced_and_nothing_stays_counted(machine: Installation) -> None:
    for _ in range(3):
        streams = [iter(stream("a", max_tokens=400, ignore_eos=True)) for _ in range(6)]
        for each in streams:
            next(each)
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 6)
        before = workers(machine)
        machine.run("kill", "-KILL", *before)
        machine.wait_until(partial(staffed, machine, 2, besides=before))
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 0)
        assert "slept in" in machine.ctl("sleep", "a").stdout
        assert chat("a").status == 200
    log = machine.journal("-u", _GATEWAY)
    assert log.count("was killed by signal 9; another one takes its place") == 6
    assert "Traceback" not in log


def test_they_end_with_the_gateway(machine: Installation) -> None:
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", _GATEWAY)
    machine.wait_until(lambda: machine.show(_GATEWAY, "ActiveState") == "active", 30)
    assert chat("a").status == 200
    machine.wait_until(partial(staffed, machine, 2))
    machine.systemctl("stop", _GATEWAY)
    assert not workers(machine)
