"""The strict YAML reader."""

from pathlib import Path
from typing import Any

import pytest

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
