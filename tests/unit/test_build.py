"""setup.py where the relay cannot be compiled. tests/integration/test_compiled.py has the relay that it did compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
_BUILD_LIMIT_S = 50


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
