"""Replicas and sleeps that leak, in a real systemd: what tests/property decides, carried out."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from client import chat, stream
from testbed import Installation

_GIB = 1 << 30
_MODELS = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}, {{memory: 24GiB}}]}}
policy: {{min_residency: 0s}}
defaults: {{engine: sim, sim: {{load_time: 200ms, wake_time: 50ms, tokens_per_second: 20}}}}
models:
  hot: {{vram: 14GiB, concurrency: 1, replicas: {{max: 2}}, idle: {{sleep_after: 3s}}}}
  steady: {{vram: 3GiB, replicas: {{min: 2, max: 2}}}}
  leaky: {{vram: 4GiB, args: ["--sleep-leaks", "{_GIB}"]}}
"""


@pytest.fixture(scope="module")
def machine(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


def instances(machine: Installation, model: str) -> dict[str, dict[str, Any]]:
    """By placement."""
    found = next(each for each in machine.status()["models"] if each["name"] == model)
    return {instance["placement"]: instance for instance in found["instances"]}


def test_those_that_stand_by_are_up_before_anybody_asks(machine: Installation) -> None:
    chat("leaky")  # starts the gateway, if nothing else has
    machine.wait_until(lambda: len(instances(machine, "steady")) == 2, 20)
    assert set(instances(machine, "steady")) == {"0", "1"}


def test_a_crowd_brings_a_second_instance_on_the_other_gpu(machine: Installation) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(lambda: list(stream("hot", max_tokens=100, ignore_eos=True))) for _ in range(3)]
        machine.wait_until(lambda: sum(i["in_flight"] for i in instances(machine, "hot").values()) == 2, 20)
        units = instances(machine, "hot")
        assert {placement: each["in_flight"] for placement, each in units.items()} == {"0": 1, "1": 1}
        assert machine.systemctl("is-active", "mmd-model-hot@0.service", "mmd-model-hot@1.service").split() == [
            "active",
            "active",
        ]
        assert all(answer.result(60)[-2] == "data: [DONE]" for answer in answers)
    machine.wait_until(lambda: all(i["state"] == "sleeping" for i in instances(machine, "hot").values()), 20)
    assert chat("hot").status == 200
    assert sorted(i["state"] for i in instances(machine, "hot").values()) == ["ready", "sleeping"], "one is enough"


def test_an_engine_whose_sleeps_leave_more_each_time_is_started_anew(machine: Installation) -> None:
    chat("leaky")
    (first,) = (each["pid"] for each in instances(machine, "leaky").values())
    machine.ctl("sleep", "leaky")
    chat("leaky")
    assert [each["pid"] for each in instances(machine, "leaky").values()] == [first]
    machine.ctl("sleep", "leaky")
    machine.wait_until(lambda: not instances(machine, "leaky"), 10, "it is stopped: its second sleep left 1 GiB more")
    begun = time.monotonic()
    assert chat("leaky").status == 200
    assert time.monotonic() - begun < 20
    assert [each["pid"] for each in instances(machine, "leaky").values()] != [first]
