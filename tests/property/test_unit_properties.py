"""Properties: whatever text a setting holds, there is an error, or a unit in which systemd reads what was meant."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmd import kinds
from mmd.errors import MmdError
from mmd.load import load_text
from mmd.model_settings import MODEL
from mmd.names import model_user
from mmd.scope import Scope
from mmd.setting import Section, Setting, walk
from mmd.settings import TOP
from mmd.unitfile import path, render, text
from mmd.unitparser import parse_unit
from mmd.units import render_units
from mmd.yamlfile import dump

HOSTILE = [
    "/srv/w\\",
    "/a\nUser=root",
    "\\",
    "a\\",
    " a",
    "a ",
    "\ufdd0",
    "\U0001fffe",
    "\x00",
    "\r",
    "/x\x0b",
    ";",
    "#",
    "%i",
    "~",
]
ANY_TEXT = st.sampled_from(HOSTILE) | st.text(max_size=12) | st.builds("/{}".format, st.text(max_size=12))


def text_settings(section: Section) -> list[tuple[str, ...]]:
    """Where people may write text, found in the table: a new setting is covered by itself."""
    found = []
    for where, entry in walk(section):
        if isinstance(entry, Setting) and "NAME" not in where:
            try:
                entry.kind.read("/text")
            except kinds.BadValueError:
                try:
                    entry.kind.read(["/text"])
                except kinds.BadValueError:
                    try:
                        entry.kind.read({"text": "/text"})
                    except kinds.BadValueError:
                        continue
            found.append(where)
    return found


PLACES = (
    [("models", "m", *where) for where in text_settings(MODEL)] + text_settings(TOP) + [("models",), ("models", "m", "env")]
)
BASE: dict[str, Any] = {"gpus": 0, "id": "m"}


def put(document: dict[str, Any], where: tuple[str, ...], value: Any) -> None:
    for part in where[:-1]:
        document = document.setdefault(part, {})
    document[where[-1]] = value


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(PLACES),
    ANY_TEXT,
    st.sampled_from(["plain", "list", "mapping"]),
    st.sampled_from(["vllm", "command", "sim"]),
)
@example(("models", "m", "workdir"), "/srv/w\\", "plain", "command")
@example(("models", "m", "port"), "/run/mmd/ports/x\\", "plain", "vllm")
@example(("models",), "a\\", "plain", "vllm")
@example(("models", "m", "args"), "\ufdd0", "list", "vllm")
def test_text_stays_in_its_directive(where: tuple[str, ...], value: str, shape: str, engine: str) -> None:
    model = {**BASE, "engine": engine, **({"command": ["/bin/x"]} if engine == "command" else {})}
    document: dict[str, Any] = {"models": {"m": model}}
    if where == ("models",):
        document["models"] = {value: model}
    else:
        put(document, where, {"plain": value, "list": ["/x", value], "mapping": {"A": value}}[shape])
    try:
        written = dump(document)
    except UnicodeEncodeError:
        return
    loaded = load_text(written)
    units = render_units(loaded.config, scope=Scope.system(), bin_dir="/usr/lib/mmd/bin")
    assert not (set(loaded.config.models) and units.problems), "checked too late: mmdctl check and the registrar say it early"
    for name, unit in units.files.items():
        found = parse_unit(unit)
        if name.startswith("mmd-model-"):
            service = [(key, said) for section, key, said in found if section == "Service"]
            (found_model,) = loaded.config.models.values()
            user = found_model.user or model_user(found_model.id, private=found_model.is_private)
            assert service[:2] == [("User", user), ("Group", "mmd-model")]
            assert [said for key, said in service if key == "User"] == [user]
            assert user not in ("root", "mmd", "0")
            assert [key for key, _ in service].count("ExecStart") == 1
        if name.startswith("mmd-fetch-"):
            service = [(key, said) for section, key, said in found if section == "Service"]
            assert [said for key, said in service if key in ("User", "Group", "ExecStart")][:2] == ["mmd-fetch", "mmd-fetch"]
            assert [key for key, _ in service].count("User") == [key for key, _ in service].count("ExecStart") == 1


@given(st.text(), st.text())
def test_an_encoder_refuses_or_the_value_reads_back(value: str, more: str) -> None:
    for encode in (text, path):
        try:
            encoded = encode(value + more, setting="x")
        except MmdError:
            continue
        assert parse_unit(render([("A", [("Key", encoded), ("User", "u")])])) == [("A", "Key", encoded), ("A", "User", "u")]
        assert encoded.replace("%%", "%") == value + more


@given(st.text())
def test_a_unit_is_what_was_meant_or_none(value: str) -> None:
    """The last line of defence: a value that no encoder has seen."""
    try:
        unit = render([("A", [("Key", value), ("User", "u")])], header=[value])
    except (MmdError, UnicodeEncodeError):
        return
    assert parse_unit(unit) == [("A", "Key", value), ("A", "User", "u")]


@pytest.mark.parametrize("value", ["x\\", "x\nUser=root", "x\rUser=root", "x\0", " x", "x ", "\ufdd0", "\ud800"])
def test_no_unit_says_something_else(value: str) -> None:
    with pytest.raises(MmdError):
        render([("Service", [("WorkingDirectory", value), ("User", "mmd-model")])])


def test_the_reader_does_as_systemd() -> None:
    """What systemd 252 made of these, by `systemctl show`."""
    assert parse_unit("[S]\n# c \\\nUser=daemon\n") == [("S", "User", "daemon")]
    assert parse_unit("[S]\n; c \\\nUser=daemon\n") == [("S", "User", "daemon")]
    assert parse_unit("[S]\nExec=/a \\\n# hidden \\\n  b\nUser=d\n") == [("S", "Exec", "/a    b"), ("S", "User", "d")]
    assert parse_unit("[S]\nDir=/w\\\nUser=d\n") == [("S", "Dir", "/w User=d")]
    assert parse_unit("[S]\nDir=/w\\\\\nUser=d\n") == [("S", "Dir", "/w\\\\"), ("S", "User", "d")]
    assert parse_unit("[S]\nDir=/w\\ \nUser=d\n") == [("S", "Dir", "/w\\"), ("S", "User", "d")]
    assert parse_unit("[S]\nDir=/w\0User=root\n") == [("S", "Dir", "/w"), ("S", "User", "root")]
    assert parse_unit("[S]\nExec=/a \ufdd0\nUser=d\n") == [("S", "User", "d")]
