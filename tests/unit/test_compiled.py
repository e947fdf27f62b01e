"""The relay as it is installed: compiled by setup.py. What tests of the sources assert must hold for it as well."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
BUILT = CHECKOUT / "build" / "compiled"
TESTS = [
    *sorted((CHECKOUT / "tests/unit").glob("test_relay*.py")),
    CHECKOUT / "tests/property/test_fast_path.py",
    CHECKOUT / "tests/property/test_scheduler.py",
]
_BUILD_LIMIT_S = 240


def build(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py's build in `target`, with everything that is installed."""
    return subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", target, "--build-temp", target.with_name(f"{target.name}-temp")],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=_BUILD_LIMIT_S,
    )


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with the `mmd` of `folder` instead of the checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT / "tests", env=environment, check=False, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def compiled() -> Iterator[Path]:
    """The package with its extensions; only what changed since the last time is compiled again."""
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT.parent / "compiled.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        made = next(BUILT.glob("mmd__mypyc*"), None)
        if made is not None and made.stat().st_mtime < (CHECKOUT / "setup.py").stat().st_mtime:
            shutil.rmtree(BUILT)  # an extension of a module that is no longer compiled would hide its source
        built = build(BUILT, MMD_COMPILE="1")
        assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
        yield BUILT


@pytest.mark.timeout(_BUILD_LIMIT_S + 120)
def test_the_compiled_relay_passes_the_tests_of_the_relay(compiled: Path) -> None:
    loaded = "import mmd.gateway.relay.client as c, mmd.gateway.relay as relay; assert relay.compiled(), c.__file__"
    assert python(compiled, "-c", loaded).returncode == 0
    # Workers are started with what is installed, here the sources: tests/integration has compiled ones.
    done = python(compiled, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not workers", *TESTS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MMD_COMPILE": "0"}, "MMD_COMPILE=0"),
        ({"MMD_COMPILE": "", "CC": "/nonexistent/cc"}, "no C compiler (/nonexistent/cc)"),
    ],
    ids=["unwanted", "no compiler"],
)
def test_where_it_cannot_be_compiled_it_is_built_as_it_is(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    built = build(tmp_path / "mmd", **environment)
    assert built.returncode == 0, built.stderr
    assert "the relay is not compiled: " in built.stderr
    assert reason in built.stderr
    assert not list((tmp_path / "mmd").rglob("*.so"))
    loaded = "import mmd.gateway.relay.client, mmd.gateway.relay as relay; assert not relay.compiled()"
    assert python(tmp_path / "mmd", "-c", loaded).returncode == 0
