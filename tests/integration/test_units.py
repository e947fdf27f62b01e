"""The shipped units: what systemd-analyze(1) says of them, and what holds inside their sandboxes."""

import re
import subprocess
from pathlib import Path

import pytest
from testbed import CHECKOUT, Testbed

UNITS = CHECKOUT / "units"
SHIPPED = sorted(path for path in UNITS.iterdir() if path.is_file())
USERS_OWN = sorted((UNITS / "user").iterdir())
GATEWAY_EXPOSURE = 1.5


def exposure(unit: Path) -> float:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", unit], check=True, capture_output=True, text=True
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout
    return float(found[1])


def test_gateway_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-gateway.service") <= GATEWAY_EXPOSURE


def test_reload_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-reload.service") <= 2.0


def test_reload_request_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-reload-request.service") <= 1.0


def test_the_one_that_hands_ports_over_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-port@.service") <= 1.5


def test_probe_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-gpu-probe@.service") <= 2.0


def test_the_one_that_makes_users_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-user@.service") <= 1.5


def test_registrar_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-registrar@.service") <= 1.5


def test_unit_broker_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-unit-broker@.service") <= 0.8


def test_journal_reader_is_sandboxed() -> None:
    assert exposure(UNITS / "mmd-journal@.service") <= 0.5


@pytest.fixture(scope="module")
def units(booted: Testbed) -> Testbed:
    """The shipped units, users and directories in place; the sockets and programs are stand-ins."""
    for unit in SHIPPED:
        booted.write(f"/usr/lib/systemd/system/{unit.name}", unit.read_text())
    for unit in USERS_OWN:
        booted.write(f"/usr/lib/systemd/user/{unit.name}", unit.read_text())
    for program in ("mmd-gateway", "mmdctl", "python"):
        booted.write(f"/usr/lib/mmd/bin/{program}", "#!/bin/sh\n", mode=0o755)
    socket = "[Socket]\nListenStream=/run/mmd/{0}.sock\nService=mmd-gateway.service\n"
    for directory in ("system", "user"):
        for name in ("mmd-gateway", "mmd-admin", "mmd-port-i"):  # i: the instance by which a template is verified
            booted.write(f"/etc/systemd/{directory}/{name}.socket", socket.format(name))
    packaging = CHECKOUT / "packaging"
    booted.write("/usr/lib/sysusers.d/mmd.conf", (packaging / "sysusers.d/mmd.conf").read_text())
    booted.write("/usr/lib/tmpfiles.d/mmd.conf", (packaging / "tmpfiles.d/mmd.conf").read_text())
    template = (
        "[Service]\nExecStart=/bin/sleep infinity\nUser=mmd-m-qwen\nGroup=mmd-model\nRuntimeDirectory=mmd-model/qwen@%i\n"
    )
    booted.write("/etc/systemd/system/mmd-model-qwen@.service", template)
    booted.run("systemd-sysusers", "mmd.conf")
    booted.run("systemd-sysusers", "--inline", "u mmd-m-qwen -")
    booted.run("systemd-tmpfiles", "--create", "mmd.conf")
    booted.systemctl("daemon-reload")
    return booted


def test_private_systemd_is_whole(booted: Testbed) -> None:
    assert booted.systemctl("is-system-running").strip() == "running"
    assert booted.run("cat", "/proc/1/comm").stdout == "systemd\n"


@pytest.mark.parametrize("unit", SHIPPED, ids=lambda path: path.name)
def test_verify_says_nothing(units: Testbed, unit: Path) -> None:
    done = units.run("systemd-analyze", "verify", "--man=no", unit.name)
    assert done.stderr == ""


@pytest.mark.parametrize("unit", USERS_OWN, ids=lambda path: path.name)
def test_verify_of_a_users_unit_says_nothing(units: Testbed, unit: Path) -> None:
    done = units.run("systemd-analyze", "verify", "--user", "--man=no", unit.name, env={"XDG_RUNTIME_DIR": "/run"})
    assert done.stderr == ""


def test_directories(units: Testbed) -> None:
    folders = (
        "/run/mmd",
        "/run/mmd-model",
        "/run/mmd-sim",
        "/var/cache/mmd",
        "/var/cache/mmd/huggingface",
        "/etc/mmd/models.d",
    )
    stat = units.run("stat", "--format=%n %a %U %G", *folders)
    assert stat.stdout.splitlines() == [
        "/run/mmd 755 root root",
        "/run/mmd-model 755 root root",
        "/run/mmd-sim 2770 root mmd-model",
        "/var/cache/mmd 755 root root",
        "/var/cache/mmd/huggingface 755 mmd-fetch mmd-fetch",
        "/etc/mmd/models.d 755 root root",
    ]


PROBE = """
import os, select, socket, struct
ready, _, _ = select.select([3, 4], [], [])
connection, _ = socket.socket(fileno=ready[0]).accept()
pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
engine = socket.socket(socket.AF_UNIX)
engine.connect("/run/mmd-model/qwen@0/engine.sock")
open("/var/lib/mmd/probe", "w").write(f"{uid} {engine.recv(5).decode()} {os.environ['LISTEN_FDS']}")
"""
ENGINE = """
import os, socket
os.umask(0o007)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/mmd-model/qwen@0/engine.sock")
listener.listen()
connection, _ = listener.accept()
connection.send(b"hello")
"""


def test_gateway_reaches_engines_and_knows_its_callers(units: Testbed) -> None:
    """Inside the real sandbox, with a probe in the gateway's place: a socket that systemd was not asked for is skipped."""
    units.write("/usr/local/lib/probe.py", PROBE)
    units.write("/usr/local/lib/engine.py", ENGINE)
    units.write(
        "/etc/systemd/system/mmd-gateway.service.d/probe.conf",
        "[Service]\nType=exec\nExecStart=\nExecStart=/usr/bin/python3 /usr/local/lib/probe.py\n",
    )
    units.write(
        "/etc/systemd/system/mmd-model-qwen@.service.d/engine.conf",
        "[Service]\nRuntimeDirectoryMode=0750\nExecStart=\nExecStart=/usr/bin/python3 /usr/local/lib/engine.py\n",
    )
    units.systemctl("daemon-reload")
    units.systemctl("start", "mmd-gateway.socket", "mmd-admin.socket", "mmd-model-qwen@0.service")
    units.wait_until(units.path("/run/mmd-model/qwen@0/engine.sock").exists)
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('/run/mmd/mmd-gateway.sock')"
    uid = units.run("id", "--user", "mmd-m-qwen").stdout.strip()
    units.run("python3", "-c", connect, user="mmd-m-qwen")
    probe = units.path("/var/lib/mmd/probe")
    units.wait_until(lambda: probe.exists() and probe.read_text(), what="the probe's answer")
    assert probe.read_text() == f"{uid} hello 2"


def test_a_change_during_a_reload_is_not_lost(units: Testbed) -> None:
    """The stand-in for mmdctl notes what it reads, then takes its time, as daemon-reload does."""
    units.write("/usr/lib/mmd/bin/mmdctl", "#!/bin/sh\ncat /etc/mmd/mmd.yaml /etc/mmd/models.d/*; sleep 0.7\n", mode=0o755)
    units.write("/etc/mmd/models.d/a.yaml", "nothing\n")
    units.write("/etc/mmd/mmd.yaml", "zero\n")
    units.systemctl("start", "mmd-reload.path")

    def seen(text: str) -> bool:
        return text in units.journal("--unit=mmd-reload.service").splitlines()

    units.write("/etc/mmd/mmd.yaml", "first\n")
    units.wait_until(lambda: seen("first"))
    units.write("/etc/mmd/models.d/a.yaml", "second\n")
    units.wait_until(lambda: seen("second"))
    units.wait_until(lambda: units.show("mmd-reload.service", "ActiveState") == "inactive")
    units.write("/etc/mmd/models.d/a.yaml", "third\n")
    units.wait_until(lambda: seen("third"))
    units.systemctl("stop", "mmd-reload.path", "mmd-reload-request.service", "mmd-reload.service")


def test_a_file_of_the_future_is_read_once(units: Testbed) -> None:
    units.write("/usr/lib/mmd/bin/mmdctl", "#!/bin/sh\necho reload of $(cat /etc/mmd/mmd.yaml)\n", mode=0o755)
    units.write("/etc/mmd/models.d/a.yaml", "nothing\n")
    units.run("touch", "--date=2099-01-01", "/etc/mmd/models.d/a.yaml")
    units.systemctl("start", "mmd-reload.path")
    try:
        units.write("/etc/mmd/mmd.yaml", "the future\n")
        units.run("touch", "--date=2099-01-01", "/etc/mmd/mmd.yaml")
        said = "reload of the future"
        units.wait_until(lambda: said in units.journal("--unit=mmd-reload.service").splitlines())
        units.wait_until(lambda: units.show("mmd-reload.service", "ActiveState") == "inactive", 5, "the reload has ended")
        # Once for the text, and once more at most for the date, which is a change of its own.
        assert 1 <= units.journal("--unit=mmd-reload.service").splitlines().count(said) <= 2
    finally:
        units.systemctl("stop", "mmd-reload.path", "mmd-reload-request.service", "mmd-reload.service")
