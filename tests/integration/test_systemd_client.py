"""The systemd client against a real systemd. The scenarios run inside it, next to its bus: see client_scenarios.py."""

import sys
from pathlib import Path

import pytest
from client_scenarios import SCENARIOS
from testbed import Testbed

PROGRAM = Path(__file__).with_name("client_scenarios.py")


@pytest.fixture(scope="module")
def prepared(booted: Testbed) -> Testbed:
    booted.run(sys.executable, PROGRAM, "prepare", "asyncio")
    return booted


def run(testbed: Testbed, name: str, loop: str, *, user: str | None = None) -> None:
    done = testbed.run(sys.executable, "-W", "error", PROGRAM, name, loop, user=user, timeout_s=50)
    print(done.stdout)
    assert done.stderr == ""


@pytest.mark.system
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(prepared: Testbed, name: str) -> None:
    run(prepared, name, "uvloop")


@pytest.mark.system
@pytest.mark.parametrize("name", ["life_of_a_unit", "bus_killed"])
def test_scenario_with_asyncio(prepared: Testbed, name: str) -> None:
    run(prepared, name, "asyncio")


@pytest.mark.system
def test_no_rights(prepared: Testbed) -> None:
    run(prepared, "no_rights", "asyncio", user="nobody")
