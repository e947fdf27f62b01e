"""The options of `mmdctl add` as a model's settings, and complaints in the words of the command line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmd.ctl.definition import definitions, with_options
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.main import parser

MMDCTL = str(Path(sys.executable).with_name("mmdctl"))


def defined(*words: str) -> object:
    arguments = parser().parse_args(["add", *words])
    return definitions(arguments.name, arguments.source, arguments)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ((), {}),
        (("--vram", "18GiB", "--gpus", "2"), {"vram": "18GiB", "gpus": 2}),
        (("--gpus", "[0, 1]"), {"gpus": [0, 1]}),
        (("--model", "1234", "--description", "no: yes"), {"model": "1234", "description": "no: yes"}),
        (("--pin", "--no-preload"), {"pin": True, "preload": False}),
        (("--alias", "a", "--alias", "1", "--arg=--x", "--arg", "7"), {"aliases": ["a", "1"], "args": ["--x", "7"]}),
        (("--env", "A=b=c", "--env", "N=1"), {"env": {"A": "b=c", "N": "1"}}),
        (
            ("--set", "idle.stop_after=30min", "--set", "idle.sleep_after=off"),
            {"idle": {"stop_after": "30min", "sleep_after": "off"}},
        ),
        (("--set", 'command=["x", "{port}"]', "--set", "sleep.level=2"), {"command": ["x", "{port}"], "sleep": {"level": 2}}),
        (("--set", "filters={strip: [a]}", "--set", "filters.set.b=1"), {"filters": {"strip": ["a"], "set": {"b": 1}}}),
        (("--priority", "3", "--ram", "0"), {"priority": 3, "ram": 0}),
    ],
)
def test_options_are_settings(words: tuple[str, ...], settings: object) -> None:
    assert defined("x", *words) == {"x": settings}


@pytest.mark.parametrize("words", [(), ("--vram", "1GiB"), ("x", "--set", "pin"), ("x", "--env", "=1"), ("x", "--set", "a=[")])
def test_what_is_no_definition_is_a_mistake_of_usage(words: tuple[str, ...]) -> None:
    with pytest.raises(CtlError) as caught:
        defined(*words)
    assert caught.value.exit_code is Exit.USAGE


def test_settings_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "models"
    source = f"--from={file}"
    file.write_text("a: {vram: 1GiB}\nb:\n")
    assert defined(source) == {"a": {"vram": "1GiB"}, "b": None}
    file.write_text("models: {a: {vram: 1GiB}}")
    assert defined(source) == {"a": {"vram": "1GiB"}}
    file.write_text("{vram: 1GiB, idle: {stop_after: 1h}}")
    settings = {"vram": "2GiB", "idle": {"stop_after": "1h", "sleep_after": "1min"}}
    assert defined("x", source, "--vram", "2GiB", "--set", "idle.sleep_after=1min") == {"x": settings}
    for text, words in (("a: [", "models:2"), ("- a", "must be a mapping"), ("models: [a]", "must be a mapping of names")):
        file.write_text(text)
        with pytest.raises(CtlError, match=words):
            defined(source)
    with pytest.raises(CtlError, match="No such file"):
        defined(f"--from={tmp_path / 'missing'}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a: {pin: true}")))
    assert defined("--from", "-") == {"a": {"pin": True}}


def test_a_complaint_names_the_option() -> None:
    arguments = parser().parse_args(["add", "x", "--vram", "4", "--alias", "b", "--set", "idle.foo=1"])
    told = with_options("models.x.vram: bad\nmodels.x.aliases.0: taken\nmodels.x.idle.foo: unknown", "x", arguments)
    assert told == "--vram: models.x.vram: bad\n--alias: models.x.aliases.0: taken\n--set: models.x.idle.foo: unknown"


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mmd").mkdir()
    (tmp_path / "mmd/mmd.yaml").write_text("models: {}\n")
    command = [MMDCTL, "--user", "add", "a/b", "--engine", "sim", "--gpus", "0", "--dry-run", "--json"]
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=True)
    ((file, text),) = json.loads(done.stdout).items()
    assert file == str(tmp_path / "mmd/models.d/a-b.yaml")
    assert "  a/b: {engine: sim, gpus: 0}" in text
    assert [path.name for path in (tmp_path / "mmd").iterdir()] == ["mmd.yaml"]
