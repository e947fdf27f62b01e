"""SECURITY.md: each sentence of its tables names a test that exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
_TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
_ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and " | " in line and "::" in line]


@pytest.mark.parametrize(("file", "name"), sorted(set(_TEST.findall(TEXT))))
def test_tests_that_are_named_exist(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


def test_every_sentence_has_a_test() -> None:
    tables = TEXT.partition("## Local users")[2].splitlines()
    sentences = [line for line in tables if line.startswith("| ") and not line.startswith("| sentence ")]
    assert [line for line in sentences if not _TEST.search(line.rpartition(" | ")[2])] == []
    assert len(sentences) == len(_ROWS)
