"""Properties: the loader and jsonschema agree, whatever the document; quoting and formats read back."""

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mmd.check import Complaint, read_section
from mmd.errors import MmdError
from mmd.kinds import NAME, BadValueError
from mmd.load import MODEL_KEYS, load_text
from mmd.model_settings import DEFAULTS, MODEL, PROFILE
from mmd.quantity import format_count, format_duration, format_size, parse_count, parse_duration, parse_size
from mmd.schema import schema
from mmd.setting import Section
from mmd.settings import TOP
from mmd.unitfile import command_line, quote
from mmd.yamlfile import dump, parse

VALIDATOR = Draft202012Validator(schema())
FILE = Path("mmd.yaml")

VALID: dict[str, Any] = {
    "gateway": {
        "listen": ["127.0.0.1:8000", "[::1]:80", "/run/x.sock"],
        "admin_listen": [],
        "admin_auth": "open",
        "request_log": False,
        "max_body": "64MiB",
        "queue_limit": 5,
        "wait_limit": "10min",
        "loading_keepalive": "off",
        "workers": 1,
    },
    "gpus": {"provider": "sim", "reserve": 0, "devices": [{"memory": "24GiB"}, 0, "GPU-1a"]},
    "resources": {"ram": "auto", "license": 2, "disk": "1GiB", "scratch": {"command": ["df", 1], "interval": "1s"}},
    "policy": {"evict": "lru", "max_wait": "60s"},
    "defaults": {"env": {"A": "b", "C": 1}},
    "profiles": {"long": {"args": ["--x", 5], "idle": {"stop_after": "never", "min_sleep": 0}}},
    "models": {
        "org/a": {"id": "a", "aliases": ["x"], "vram": "18GiB", "params": "7.6B", "precision": "bf16", "gpus": [0, "MIG-x"]},
        "b": {"engine": "command", "command": ["x"], "listen": "tcp:80", "health": {"path": "/h", "interval": "50ms"}},
        "c": {"engine": "external", "endpoint": "http://x"},
        "d": {"sim": {"tokens_per_second": 0.5}, "sleep": {"level": 2}, "limits": {"cpu_weight": 100}, "venv": "/opt/x"},
        "s": {"engine": "sim", "gpus": 0, "env": {"A_KEY": "b"}, "secrets": {"T": "/x/y"}},
        "e": {"resources": {"license": 1, "disk": "1MiB"}},
        "f": None,
    },
}


def accepted_by_loader(value: Any) -> bool:
    """Whether the loader's own checks by the table (not the rules between keys) find nothing."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) - {*TOP.entries, *MODEL_KEYS}:
        return False
    complaints: list[Complaint] = []
    for key, entry in (*TOP.entries.items(), ("defaults", DEFAULTS)):
        assert isinstance(entry, Section)
        read_section(entry, value.get(key), (), complaints)
    for key, entry in (("profiles", PROFILE), ("models", MODEL)):
        named = value.get(key)
        if named is not None and not isinstance(named, dict):
            return False
        for name, raw in (named or {}).items():
            try:
                NAME.read(name)
            except BadValueError:
                return False
            read_section(entry, raw, (), complaints)
    return not complaints


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in children for place in places(item, (*path, key)))]


ODD = [
    "off",
    "never",
    "auto",
    "x\n",
    "0",
    "0s",
    "5min",
    "1GiB",
    "127.0.0.1:8000",
    "[::]:1",
    "localhost:1",
    "/x",
    "/x\n",
    "/\x85",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70000)
    | st.floats(allow_nan=False)
    | st.sampled_from([0.0, 1.0, 2.0, 1.5])
    | st.text(max_size=8)
    | st.sampled_from(ODD)
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(st.sampled_from(["memory", "command", "interval", "level", "x"]), SCALARS, max_size=2)
)
KEYS = st.sampled_from(
    ["vrma", "id", "listen", "engine", "workers", "cors_origins", "lora", "profile", "x\n", "", "ram"]
) | st.text(max_size=5)


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """A valid document after a few changes."""
    document = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(places(document)[1:]))
        parent: Any = document
        for part in path[:-1]:
            parent = parent[part]
        what = draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            parent[path[-1]] = draw(VALUES)
        elif what == "remove":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(KEYS)] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
        if not document:
            break
    return document


@settings(max_examples=400, deadline=None)
@given(documents())
@example(None)
@example([])
@example({"gateway": {"workers": True}})
@example({"gateway": {"workers": 1.0}})
@example({"models": {"a": {"args": [1.0, True]}}})
@example({"models": {"a": {"vram": "0GiB"}}})
@example({"models": {"a": {"id": "a\n"}}})
@example({"resources": {"x\n": 1}})
def test_the_loader_and_the_schema_agree(document: Any) -> None:
    assert accepted_by_loader(document) == VALIDATOR.is_valid(document)


@settings(max_examples=200, deadline=None)
@given(documents())
def test_the_loader_never_fails(document: Any) -> None:
    loaded = load_text(dump(document), file=FILE)
    models = document.get("models")
    assert set(loaded.config.models) <= set(models if isinstance(models, dict) else ())
    assert all(problem.file == FILE and problem.line > 0 for problem in loaded.problems)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_no_text_breaks_the_reader(text: str | bytes) -> None:
    document = parse(text, FILE)
    assert document.value is None or not document.problems or document.root is not None
    load_text(text)


@given(
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3))
)
def test_dumped_values_read_back(value: Any) -> None:
    infinite = "inf" in repr(value)
    surrogate = any(0xD800 <= ord(char) <= 0xDFFF for char in repr(value))
    if not infinite and not surrogate:
        assert parse(dump({"x": value}), FILE).value == {"x": value}


@given(st.integers(0, 10**15))
def test_sizes_read_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, 10**12))
def test_durations_read_back(microseconds: int) -> None:
    assert parse_duration(format_duration(microseconds / 1_000_000)) == microseconds / 1_000_000


@given(st.integers(1, 10**6))
def test_counts_read_back(thousands: int) -> None:
    assert parse_count(format_count(thousands * 1000.0)) == thousands * 1000.0


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), min_size=1, max_size=5)
)
def test_command_lines_read_back(words: list[str]) -> None:
    """Against a reader of systemd.service(5)'s quoting; tests/integration/test_model_unit.py asks a real systemd."""
    if any(0xFDD0 <= ord(char) <= 0xFDEF or ord(char) & 0xFFFE == 0xFFFE for char in "".join(words)):
        with pytest.raises(MmdError):
            command_line(["/x", *words])
        return
    logical = command_line(["/x", *words]).replace("\\\n", " ")
    assert "\n" not in logical
    assert [unquote(word) for word in split(logical)] == ["/x", *words]


def test_specifiers_stay_where_they_are_meant() -> None:
    assert quote("--a=%t/x@%i/s,%i $x", specified="%t/x@%i/s") == '"--a=%t/x@%i/s,%%i $$x"'
    assert quote("A=%i $x", variables=False) == '"A=%%i $x"'
    assert shlex.split(quote("two words")) == ["two words"]


def split(line: str) -> list[str]:
    words, word, quoted, rest = [], "", False, iter(line)
    for char in rest:
        if char == "\\":
            word += char + next(rest)
        elif char == '"':
            quoted = not quoted
            word += char
        elif char == " " and not quoted:
            words += [word] if word else []
            word = ""
        else:
            word += char
    return words + ([word] if word else [])


def unquote(word: str) -> str:
    text, rest = "", iter(word.removeprefix('"').removesuffix('"') if word.startswith('"') else word)
    for char in rest:
        if char == "\\":
            code = next(rest)
            text += chr(int(next(rest) + next(rest), 16)) if code == "x" else {"n": "\n", "t": "\t", "r": "\r"}.get(code, code)
        elif char in "%$":
            assert next(rest) == char
            text += char
        else:
            text += char
    return text
