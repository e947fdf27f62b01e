"""The relay as it is installed: compiled by setup.py. What tests of the sources assert must hold for it as well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from testbed import CHECKOUT, prepared_layer

# What these measure or attack is no matter of how it was built, or, as in test_fuzz.py, done to the compiled one by others.
_ELSEWHERE = {"test_relay_fuzz.py", "test_relay_memory.py"}
_TESTS = [
    *sorted(path for path in (CHECKOUT / "tests/unit").glob("test_relay*.py") if path.name not in _ELSEWHERE),
    CHECKOUT / "tests/property/test_fast_path.py",
]


def python(packages: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The tests' Python with the `mmd` that is installed in `packages` instead of the checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT / "tests", env=environment, check=False, capture_output=True, text=True
    )


@pytest.mark.timeout(240)
def test_the_compiled_relay_passes_the_tests_of_the_relay(root_only: None) -> None:
    (packages,) = prepared_layer().glob("usr/lib/mmd/lib/python3*/site-packages")
    loaded = "import mmd.gateway.relay.client as c, mmd.gateway.relay as relay; assert relay.compiled(), c.__file__"
    assert python(packages, "-c", loaded).returncode == 0
    # Workers are started with what is installed beside pytest, the sources: the other tests in this folder have compiled ones.
    done = python(packages, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not workers", *_TESTS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
