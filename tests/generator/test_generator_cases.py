"""Each file in cases/ is a configuration that carries its own assertions as comments (as Podman Quadlet's tests do).

## assert-key UNIT SECTION KEY VALUE       the unit has this line (one of several with that key will do)
## assert-no-key UNIT SECTION KEY
## assert-words UNIT WORDS                 ExecStart= has these words, as the unit spells them
## assert-no-words UNIT WORDS
## assert-unit UNIT, ## assert-no-unit UNIT, ## assert-units NUMBER
## assert-link LINK TARGET
## assert-problem TEXT                     a problem's message contains this
## assert-problems NUMBER
## scope user
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmd.load import load_files
from mmd.scope import Scope
from mmd.units import render_units

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))


@dataclass(frozen=True, slots=True)
class Outcome:
    files: dict[str, str]
    links: dict[str, str]
    problems: list[str]

    def values(self, unit: str, section: str, key: str) -> list[str]:
        """All values of a key, with continued lines joined."""
        assert unit in self.files, f"no {unit}, but {sorted(self.files)}"
        found, current = [], ""
        for line in self.files[unit].replace(" \\\n  ", " ").splitlines():
            if line.startswith("["):
                current = line.strip("[]")
            elif current == section and not line.startswith("#") and line.partition("=")[0] == key:
                found.append(line.partition("=")[2])
        return found

    def assert_key(self, unit: str, rest: str) -> None:
        section, key, value = rest.split(" ", 2)
        assert value in self.values(unit, section, key)

    def assert_no_key(self, unit: str, rest: str) -> None:
        assert self.values(unit, *rest.split(" ")) == []

    def assert_words(self, unit: str, words: str) -> None:
        (command,) = self.values(unit, "Service", "ExecStart")
        assert f" {words} " in f" {command} "

    def assert_no_words(self, unit: str, words: str) -> None:
        (command,) = self.values(unit, "Service", "ExecStart")
        assert f" {words} " not in f" {command} "

    def assert_unit(self, unit: str, _: str) -> None:
        assert unit in self.files

    def assert_no_unit(self, unit: str, _: str) -> None:
        assert unit not in self.files

    def assert_units(self, number: str, _: str) -> None:
        assert len(self.files) == int(number), sorted(self.files)

    def assert_link(self, link: str, target: str) -> None:
        assert self.links[link] == target

    def assert_problem(self, first: str, rest: str) -> None:
        text = f"{first} {rest}".strip()
        assert any(text in problem for problem in self.problems), self.problems

    def assert_problems(self, number: str, _: str) -> None:
        assert len(self.problems) == int(number), self.problems

    def check(self, assertion: str) -> None:
        name, _, rest = assertion.partition(" ")
        first, _, rest = rest.partition(" ")
        method: Callable[[str, str], None] = getattr(self, name.replace("-", "_"))
        method(first, rest)


def run(file: Path) -> Outcome:
    text = file.read_text()
    environment = {"HOME": "/home/me", "XDG_RUNTIME_DIR": "/run/user/1000"}
    scope = Scope.user(environment) if "## scope user\n" in text else Scope.system()
    loaded = load_files([(scope.config_file, text)], scope=scope)
    units = render_units(loaded.config, scope=scope, bin_dir="/usr/lib/mmd/bin")
    return Outcome(dict(units.files), dict(units.links), [str(problem) for problem in (*loaded.problems, *units.problems)])


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_case(file: Path) -> None:
    outcome = run(file)
    assertions = [line.removeprefix("## ") for line in file.read_text().splitlines() if line.startswith("## assert-")]
    assert assertions
    for assertion in assertions:
        outcome.check(assertion)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 15
