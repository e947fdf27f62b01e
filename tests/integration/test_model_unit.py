"""Generated units in a real systemd: words arrive as they were written, and engines cannot reach each other."""

import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from testbed import CHECKOUT, Testbed

from mmd.load import load_text
from mmd.scope import Scope
from mmd.units import render_units

PROGRAMS = "/opt/mmd-test/bin"

# Stands in for mmd-runner: listens where the engine would, looks around, says READY, and stays.
PROBE = """\
#!/usr/bin/python3
import json, os, pwd, socket, sys, time
directory = sys.argv[sys.argv.index("--directory") + 1]
server = socket.socket(socket.AF_UNIX)
path = os.path.join(directory, "engine.sock")
if os.path.exists(path):
    os.unlink(path)
server.bind(path)
server.listen()
def reach(path):
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        return "open"
    except OSError as error:
        return type(error).__name__
def look(path):
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        return type(error).__name__
def writable(path):
    file = os.path.join(path, f"probe-{os.getpid()}")
    try:
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
        os.unlink(file)
        return True
    except OSError:
        return False
others = [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
report = {
    "argv": sys.argv[1:],
    "environment": dict(os.environ),
    "directory": look("/run/mmd-model"),
    "first": reach("/run/mmd-model/first@cpu/engine.sock"),
    "processes": len(others),
    "sim": writable("/run/mmd-sim"),
    "home": writable(os.environ["HOME"]),
    "cache": writable("/var/cache/mmd"),
    "user": pwd.getpwuid(os.getuid()).pw_name,
    "system": writable("/usr"),
}
with open(os.path.join(directory, "probe.json"), "w") as file:
    json.dump(report, file)
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1))
while True:
    notify.send(b"READY=1\\nWATCHDOG=1")
    time.sleep(5)
"""

WORDS = [
    *(
        "plain",
        "--option",
        "",
        " ",
        "two words",
        "'single'",
        '"double"',
        "back\\slash",
        "end\\",
        "%i",
        "%%",
        "$HOME",
        "${HOME}",
    ),
    *(
        "$$",
        ";",
        "@x",
        "-",
        "tab\tline\nreturn\r",
        "\x01\x1f\x7f",
        "äöü 模型 😀",
        "a=b",
        "#no",
        "{port}",
        "*",
        "~",
        "\\x41",
        "!",
    ),
]


def start(booted: Testbed, models: dict[str, Any], *units: str) -> None:
    booted.write(f"{PROGRAMS}/mmd-runner", PROBE, mode=0o755)
    unit = (CHECKOUT / "units/mmd-user@.service").read_text()
    booted.write("/usr/lib/systemd/system/mmd-user@.service", unit.replace("/usr/lib/mmd/bin/python -I", f"{PROGRAMS}/python"))
    python = f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {sys.executable} -B "$@"\n'
    booted.write(f"{PROGRAMS}/python", python, mode=0o755)
    text = json.dumps(
        {"gpus": {"provider": "sim", "devices": [{"memory": "24GiB"}]}, "models": models}, ensure_ascii=False
    ).replace("\x7f", "\\x7f")
    loaded = load_text(text, file=Path("/etc/mmd/mmd.yaml"))
    assert loaded.problems == ()
    rendered = render_units(loaded.config, scope=Scope.system(), bin_dir=PROGRAMS)
    assert rendered.problems == ()
    for name, unit in rendered.files.items():
        if name.startswith("mmd-model-"):
            booted.write(f"/run/systemd/system/{name}", unit)
    booted.run("systemd-sysusers", *(CHECKOUT / "packaging/sysusers.d").iterdir())
    booted.run("systemd-tmpfiles", "--create", *(CHECKOUT / "packaging/tmpfiles.d").iterdir())
    booted.systemctl("daemon-reload")
    booted.systemctl("start", *units)


def probe(booted: Testbed, unit: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(booted.read(f"/run/mmd-model/{unit}/probe.json"))
    return found


def test_words_arrive_as_written(booted: Testbed) -> None:
    name = "we%ird $name \\ \"x'"
    models = {
        name: {"id": "words", "gpus": 0, "engine": "command", "command": ["/bin/x", *WORDS], "env": {"A": "".join(WORDS)}}
    }
    start(booted, models, "mmd-model-words@cpu.service")
    seen = probe(booted, "words@cpu")
    assert seen["argv"][seen["argv"].index("--") + 1 :] == ["/bin/x", *WORDS]
    assert seen["argv"][seen["argv"].index("--model") + 1] == name
    assert seen["argv"][seen["argv"].index("--gpus") + 1] == "cpu"
    assert seen["environment"]["A"] == "".join(WORDS)
    logged = booted.show("mmd-model-words@cpu.service", "Description")
    assert logged == f"mmd model {name} on cpu"
    booted.systemctl("stop", "mmd-model-words@cpu.service")


@pytest.mark.parametrize("engine", ["command", "sim"])
def test_engines_cannot_reach_each_other(booted: Testbed, engine: str) -> None:
    model = {"command": ["/bin/x"], "listen": "unix"} if engine == "command" else {}
    models = {name: {"engine": engine, "gpus": 0, **model} for name in ("first", "second")}
    start(booted, models, "mmd-model-first@cpu.service", "mmd-model-second@cpu.service")
    first, second = probe(booted, "first@cpu"), probe(booted, "second@cpu")
    assert first["directory"] == ["first@cpu"]
    assert first["first"] == "open"
    assert second["directory"] == ["second@cpu"]
    assert second["first"] == "FileNotFoundError"
    assert (first["user"], second["user"]) == ("mmd-m-first", "mmd-m-second")
    assert second["processes"] == 0
    assert second["sim"] is (engine == "sim")
    assert second["home"] is True
    assert second["cache"] is False
    assert second["system"] is False
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/mmd-model/first@cpu/engine.sock')"
    booted.run("setpriv", "--reuid=mmd", "--regid=mmd", "--groups=mmd-model", "python3", "-c", connect)
    denied = booted.run("setpriv", "--reuid=nobody", "--clear-groups", "python3", "-c", connect, check=False)
    assert "PermissionError" in denied.stderr
    booted.systemctl("restart", "mmd-model-first@cpu.service")
    assert probe(booted, "first@cpu")["first"] == "open"
    booted.systemctl("stop", "mmd-model-first@cpu.service", "mmd-model-second@cpu.service")
    assert booted.path("/run/mmd-model/first@cpu/probe.json").exists()


def test_systemd_runs_the_generator(booted: Testbed) -> None:
    marker = f"marker-{uuid.uuid4().hex}"  # the kernel's log is everybody's
    booted.write("/etc/mmd/mmd.yaml", f"models:\n  generated: {{gpus: 0}}\n  {marker}: {{vrma: 1}}\n")
    program = f'#!/bin/sh\nexec {sys.executable} -IB -m mmd.generator "$@"\n'
    booted.write("/run/systemd/system-generators/mmd-generator", program, mode=0o755)
    booted.systemctl("daemon-reload")
    assert booted.show("mmd-model-generated@0.service", "FragmentPath") == (
        "/run/systemd/generator/mmd-model-generated@.service"
    )
    assert booted.show(f"mmd-model-{marker}@0.service", "LoadState") == "not-found"
    wanted = booted.show("sockets.target", "Wants").split()
    assert {"mmd-gateway.socket", "mmd-admin.socket", "mmd-admin-tcp.socket"} <= set(wanted)
    said = booted.journal("-t", "mmd-generator")
    assert f"/etc/mmd/mmd.yaml:3: models.{marker}.vrma: unknown key (did you mean vram?)" in said
    booted.path("/run/systemd/system-generators/mmd-generator").unlink()
    booted.systemctl("daemon-reload")
