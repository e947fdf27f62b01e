"""mmd.printable, and the gateway's log: no text of others makes a line or drives a terminal."""

import logging
import sys

from hypothesis import given
from hypothesis import strategies as st

from mmd.gateway.log import _JournalFormatter
from mmd.printable import printable, quoted


def test_printable() -> None:
    assert printable("demo/llama é ✓") == "demo/llama é ✓"
    assert printable("a\nb\x1b[2J\u202e\u2028\ud800") == "a\\nb\\x1b[2J\\u202e\\u2028\\ud800"


def test_quoted() -> None:
    assert quoted("demo/llama-8b") == "demo/llama-8b"
    assert quoted("x, asked by uid 0 (root)") == "'x, asked by uid 0 (root)'"
    assert quoted("x'\n<0>y") == '"x\'\\n<0>y"'
    assert quoted("") == "''"
    assert len(quoted("long " * 1000)) < 210


@given(st.text())
def test_what_is_quoted_is_one_printable_line(text: str) -> None:
    assert quoted(text).isprintable()
    assert printable(text).isprintable()


@given(st.text(), st.text())
def test_a_message_is_one_line_of_its_own(name: str, detail: str) -> None:
    record = logging.LogRecord("mmd", logging.WARNING, "", 0, "stop %s: %s", (name, detail), None)
    first, *more = _JournalFormatter().format(record).split("\n")
    assert first.startswith("<4>stop ")
    assert all(line.startswith("<4>| ") and line.isprintable() for line in more)


def test_an_exception_cannot_look_like_a_message() -> None:
    try:
        raise ValueError("bad\n<6>stop everything, asked by uid 0 (root), pid 1")
    except ValueError:
        record = logging.LogRecord("mmd", logging.ERROR, "", 0, "a request failed", (), sys.exc_info())
    first, *more = _JournalFormatter().format(record).split("\n")
    assert first == "<3>a request failed"
    assert all(line.startswith("<3>| ") for line in more)
    assert "<3>| <6>stop everything, asked by uid 0 (root), pid 1" in more
