"""The strict YAML reader."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmd.load import load_text
from mmd.yamlfile import dump, parse

FILE = Path("/etc/mmd/mmd.yaml")


def problems(text: str | bytes) -> list[str]:
    return [str(problem) for _, problem in parse(text, FILE).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a:", {"a": None}),
        ("a: [1, -2, 1.5, 1e3, true, null, ~]", {"a": [1, -2, 1.5, 1000.0, True, None, None]}),
        (
            "a: [off, no, 0022, 12:30, 2024-01-01, 0x10, 1_000, .inf]",
            {"a": ["off", "no", "0022", "12:30", "2024-01-01", "0x10", "1_000", ".inf"]},
        ),
        ("a: ['1', \"true\", !!str 5]", {"a": ["1", "true", "5"]}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: *x", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}, "e": {"b": 1, "c": 2}}),
        ("d: {<<: [{a: 1}, {a: 2, b: 2}]}", {"d": {"a": 1, "b": 2}}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
    ],
)
def test_values(text: str, value: Any) -> None:
    document = parse(text, FILE)
    assert document.problems == ()
    assert document.value == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "/etc/mmd/mmd.yaml:3: a: given twice, first in line 1"),
        ("x:\n  a: 1\n  a: 3", "/etc/mmd/mmd.yaml:3: x.a: given twice, first in line 2"),
        ("x: {5: 1}", '/etc/mmd/mmd.yaml:1: x.5: a key must be a string (write "5")'),
        ("x: {[a]: 1}", "/etc/mmd/mmd.yaml:1: x: a key must be a string"),
        ("x: !foo 1", "/etc/mmd/mmd.yaml:1: x: the tag !foo is not supported"),
        ("x: !foo {a: 1}", "/etc/mmd/mmd.yaml:1: x: the tag !foo is not supported"),
        ("x:\n - &a [*a]", "/etc/mmd/mmd.yaml:2: x.0: an alias inside of what it stands for"),
        ("x: {<<: 5}", "/etc/mmd/mmd.yaml:1: x.<<: must be a mapping or a list of mappings"),
        ("a: [1\n", "/etc/mmd/mmd.yaml:2: not valid YAML: did not find expected ',' or ']'"),
        ("a: *b", "/etc/mmd/mmd.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2", "/etc/mmd/mmd.yaml:2: not valid YAML: but found another document"),
        ("[" * 900 + "]" * 900, "/etc/mmd/mmd.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_mistakes(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_bytes_that_are_no_text() -> None:
    (problem,) = problems(b"a: \xff")
    assert problem.startswith("/etc/mmd/mmd.yaml: not valid YAML")


def test_lines() -> None:
    document = parse("a: &x\n  b: 1\nc:\n  - 1\n  - d: 2\ne: {<<: *x}\n", FILE)
    paths: list[tuple[str | int, ...]] = [("a", "b"), ("c", 0), ("c", 1, "d"), ("e", "b"), ("e", "zz"), ("zz",)]
    assert [document.line(path) for path in paths] == [2, 4, 5, 2, 6, 1]
    assert document.has(("c", 1, "d"))
    assert not document.has(("c", 2))


@pytest.mark.parametrize(
    "text", ["off", "1e5", "1.", "0022", "12:30", "true", "", "~", "a: b", "#x", "x\ny", " x", "'", "é", "0x1"]
)
def test_dump_reads_back(text: str) -> None:
    assert parse(dump({"k": text, "l": [text]}), FILE).value == {"k": text, "l": [text]}


def bomb(levels: int) -> str:
    """Each list holds the one before it nine times."""
    lists = "".join(f"x{level + 1}: &x{level + 1} [{', '.join([f'*x{level}'] * 9)}]\n" for level in range(levels))
    return f"x0: &x0 [x, x, x, x, x, x, x, x, x]\n{lists}"


LARGE = {
    "aliases of aliases": bomb(8),
    "aliases of a long text": f"a: &a {'x' * 1_000_000}\nb: [{', '.join(['*a'] * 20)}]\n",
    "aliases that are merged": f"a: &a {{{', '.join(f'k{i}: v' for i in range(500))}}}\nb: [{', '.join(['{<<: *a}'] * 500)}]",
    "values": "[" + "a," * 200_000 + "]",
    "bytes": "a: " + "x" * (4 << 20),
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_what_stands_for_too_much_is_refused_as_a_whole(text: str) -> None:
    document = parse(text, FILE)
    assert document.value is None
    assert ": too large: " in problems(text)[0]


def test_aliases_in_use_stay_within_the_bounds() -> None:
    defaults = "d: &d {engine: sim, vram: 1GiB, idle: {stop_after: 4h}}\n"
    document = parse(defaults + "models:\n" + "".join(f"  m{i}: {{<<: *d, id: i{i}}}\n" for i in range(2000)), FILE)
    assert document.problems == ()
    assert document.value["models"]["m1999"] == {"id": "i1999", "engine": "sim", "vram": "1GiB", "idle": {"stop_after": "4h"}}


_MEASURE = """
import resource, sys
from mmd.load import load_text
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load_text(sys.stdin.buffer.read())
print(len(loaded.problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "text",
    [
        bomb(7) + "models: {m: {description: *x7}}",
        bomb(7) + "gateway: {listen: *x7}",
        "models: {m: {description: " + "[" * 400 + "]" * 400 + "}}",
        "models: {m: {description: [" + "x," * 90_000 + "]}}",
        "models: {m: {" + ", ".join(f"k{i}: 1" for i in range(40_000)) + "}}",
    ],
    ids=["aliases as a text", "aliases as a list", "depth", "a list in the place of a text", "unknown keys"],
)
def test_a_hostile_configuration_takes_little_memory(text: str) -> None:
    """387 bytes took 770 MiB."""
    done = subprocess.run([sys.executable, "-c", _MEASURE], input=text.encode(), capture_output=True, check=True, timeout=50)
    problems, kib = map(int, done.stdout.split())
    assert problems > 0
    assert kib < 128 << 10


def test_of_many_mistakes_the_first_are_told() -> None:
    assert len(problems("m: {" + "k: 1, " * 30_000 + "}")) == 100
    messages = [str(problem) for problem in load_text("models: {m: {description: [" + "x," * 10_000 + "]}}").problems]
    assert len(messages) == 1
    assert len(messages[0]) < 500
