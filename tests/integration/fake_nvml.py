"""The fake libnvidia-ml.so.1, which the real pynvml loads, and its state file: see tests/unit/fakenvml/fakenvml.c.

tests/unit/conftest.py makes its fixtures known there.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["build_library", "library_dir", "nvml", "write_state"]

_SOURCE = Path(__file__).parents[1] / "unit" / "fakenvml" / "fakenvml.c"
_FLAGS = (
    *("-std=c11", "-Wall", "-Wextra", "-Werror", "-D_DEFAULT_SOURCE"),
    *("-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"),
)


def build_library(directory: Path) -> None:
    """Makes DIRECTORY/libnvidia-ml.so.1."""
    subprocess.run(["gcc", *_FLAGS, "-o", directory / "libnvidia-ml.so.1", _SOURCE], check=True)


def write_state(file: Path, text: str) -> None:
    """Replaces the state in one step, since it may be read at any moment."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


@pytest.fixture(scope="session")
def library_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the fake library is, freshly built."""
    directory = tmp_path_factory.mktemp("fakenvml")
    build_library(directory)
    return directory


@pytest.fixture
def nvml(library_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the state of the fake machine, which this process and its children see from now on."""
    state = tmp_path / "nvml"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library_dir))
    monkeypatch.setenv("FAKE_NVML_STATE", str(state))
    return lambda text: write_state(state, text)
