"""packaging/locks against pyproject.toml, without the index: what packaging/up and tests/run install is complete and hashed."""

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[2]
LOCKS = CHECKOUT / "packaging" / "locks"
NAMES = ("build", "run", "sdist", "test", "uv")
INSTALLED = {"run": ("run", "sdist"), "build": ("build",), "test": ("test", "sdist")}
"""What is installed together, and so has to be complete."""

_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
_PIN = re.compile(r"([a-z0-9-]+)==([A-Za-z0-9.]+)(?: ; (.+))?")


class Entry(NamedTuple):
    requirement: Requirement
    hashes: int

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        return specifier.version


def entries(lock: str) -> dict[str, Entry]:
    """What a lock names. Every line is either a pin or a hash: no option (an index), no address, no name without a version."""
    found: dict[str, Entry] = {}
    text = (LOCKS / f"{lock}.txt").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    for line in lines.splitlines():
        pin, *hashes = re.split(r"\s+(?=--)", line.strip())
        assert _PIN.fullmatch(pin), f"{lock}.txt: {pin}"
        assert all(_HASH.fullmatch(word) for word in hashes), f"{lock}.txt: {line[:200]}"
        requirement = Requirement(pin)
        assert canonicalize_name(requirement.name) not in found, f"{lock}.txt: {requirement.name} twice"
        found[canonicalize_name(requirement.name)] = Entry(requirement, len(hashes))
    assert found
    return found


def together(kind: str) -> dict[str, Entry]:
    return {name: entry for lock in INSTALLED[kind] for name, entry in entries(lock).items()}


def wanted(kind: str) -> list[str]:
    """What pyproject.toml asks for."""
    project: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    everything: dict[str, list[str]] = {"run": project["project"]["dependencies"], "build": project["build-system"]["requires"]}
    everything["test"] = [*everything["run"], *everything["build"], *project["dependency-groups"]["test"]]
    return everything[kind]


@pytest.mark.parametrize("lock", NAMES)
def test_every_file_is_known_by_its_hash(lock: str) -> None:
    assert [name for name, entry in entries(lock).items() if not entry.hashes] == []


@pytest.mark.parametrize("kind", INSTALLED)
def test_locks_have_what_pyproject_asks_for(kind: str) -> None:
    locked = together(kind)
    for text in wanted(kind):
        requirement = Requirement(text)
        entry = locked.get(canonicalize_name(requirement.name))
        assert entry is not None, f"packaging/lock: {text} is not in {INSTALLED[kind]}"
        assert requirement.specifier.contains(entry.version, prereleases=True), f"packaging/lock: {text}, not {entry.version}"


def needed(name: str) -> Iterator[Requirement]:
    """What the installed package of this name requires on this machine, without extras."""
    for requirement in map(Requirement, distribution(name).requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


@pytest.mark.parametrize("kind", INSTALLED)
def test_locks_are_complete(kind: str) -> None:
    """They are installed with --no-deps, so that nothing comes which they do not name."""
    locked = together(kind)
    here = [name for name, entry in locked.items() if entry.requirement.marker is None or entry.requirement.marker.evaluate()]
    for name in here:
        assert distribution(name).version == locked[name].version, f"{name}: tests/run makes .venv of the locks"
        for requirement in needed(name):
            entry = locked.get(canonicalize_name(requirement.name))
            assert entry is not None, f"{name} needs {requirement}, which {INSTALLED[kind]} lack"
            assert requirement.specifier.contains(entry.version, prereleases=True), f"{name} needs {requirement}"


def test_what_is_tested_is_what_is_installed() -> None:
    tested = together("test")
    for name, entry in (together("run") | together("build")).items():
        assert tested[name].version == entry.version, name
