"""Who may drive units: the gateway's user by way of the unit broker, and by no other way; engines and local users not at all.

On systemd 257 a polkit rule that lets a user start a unit lets that user make it up as well: StartTransientUnit with User=root.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from testbed import Installation

SOCKET = "/run/mmd/unit-broker.sock"
UNIT = "mmd-model-prey@0.service"
MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
models: {prey: {engine: sim, vram: 1GiB, sim: {load_time: 10ms}}}
"""


@pytest.fixture(scope="module")
def configured(installation: Installation) -> Iterator[Installation]:
    installation.configure(MODELS)
    yield installation
    installation.stop_all()


@pytest.fixture
def prey(configured: Installation) -> Installation:
    """A model that root has started."""
    configured.systemctl("start", UNIT)
    return configured


class Broker:
    """A connection to the unit broker, made by root; the protocol is the same for the gateway's user."""

    def __init__(self, installation: Installation) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(installation.path(SOCKET)))
        self._lines = self._socket.makefile("rb")
        assert self.read() == {"ready": True}

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(self._lines.readline())
        return frame

    def rest(self) -> bytes:
        return self._lines.read()

    def ask(self, **request: object) -> dict[str, Any]:
        """The reply to one request; what is said of units meanwhile is passed over."""
        self.send(json.dumps({"id": 7, **request}).encode() + b"\n")
        return self.reply()

    def reply(self) -> dict[str, Any]:
        while "id" not in (frame := self.read()):
            assert frame.keys() & {"changed", "job_removed"}, frame
        return frame


@pytest.fixture
def broker(prey: Installation) -> Iterator[Broker]:
    broker = Broker(prey)
    yield broker
    broker.close()


@pytest.mark.parametrize("user", ["mmd", "mmd-fetch", "eve", "mallory"])
def test_no_user_drives_units_by_dbus(prey: Installation, user: str) -> None:
    before = prey.show(UNIT, "InvocationID")
    for verb in ("stop", "restart", "kill"):
        assert prey.run("systemctl", "--no-ask-password", verb, UNIT, user=user, check=False).returncode != 0
    assert (
        prey.run("systemctl", "--no-ask-password", "start", "mmd-model-prey@1.service", user=user, check=False).returncode != 0
    )
    assert (prey.show(UNIT, "InvocationID"), prey.show(UNIT, "ActiveState")) == (before, "active")
    mark = f"/run/root-by-{user}"
    for unit in ("mmd-model-evil@0.service", "mmd-model-prey@1.service"):
        evil = ("systemd-run", "--no-ask-password", f"--unit={unit}", "-p", "User=root", "--", "touch", mark)
        assert prey.run(*evil, user=user, check=False).returncode != 0
    assert not prey.path(mark).exists()


def test_there_is_no_polkit_rule_of_ours(prey: Installation) -> None:
    folders = ("usr/share/polkit-1/rules.d", "etc/polkit-1/rules.d", "usr/share/polkit-1/actions")
    files = [path for folder in folders if (prey.root / folder).is_dir() for path in (prey.root / folder).iterdir()]
    assert [path.name for path in files if "mmd" in path.name or "mmd" in path.read_text(errors="replace")] == []


@pytest.mark.parametrize("user", ["mmd-fetch", "eve", "mallory", "nobody"])
def test_only_the_gateway_reaches_the_broker(prey: Installation, user: str) -> None:
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({SOCKET!r})"
    done = prey.run("python3", "-c", connect, user=user, check=False)
    assert "PermissionError" in done.stderr
    prey.run("python3", "-c", connect, user="mmd")


def test_the_broker_asks_the_kernel_who_connects(prey: Installation) -> None:
    """With a socket that is open to all, by mistake."""
    prey.run("chmod", "0666", SOCKET)
    talk = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({SOCKET!r}); print(s.recv(100))"
    try:
        assert prey.run("python3", "-c", talk, user="eve").stdout == "b''\n"
        assert "ready" in prey.run("python3", "-c", talk, user="mmd").stdout
    finally:
        prey.run("chmod", "0600", SOCKET)
    assert "is not the gateway" in prey.journal("-t", "mmd-unit-broker")


def test_the_gateway_does_not_reach_the_bus(prey: Installation) -> None:
    prey.ctl("status")  # starts it
    pid = prey.show("mmd-gateway.service", "MainPID")
    for path, there in (("/run/mmd/unit-broker.sock", 0), ("/run/dbus/system_bus_socket", 1)):
        assert prey.run("nsenter", "--mount", "--target", pid, "test", "-S", path, check=False).returncode == there


HOSTILE: list[dict[str, object]] = [
    {"call": "stop", "unit": "mmd-gateway.service"},
    {"call": "start", "unit": "mmd-model-prey@0.service\n"},
    {"call": "start", "unit": "mmd-model-../@0.service"},
    {"call": "start", "unit": "mmd-model-prey@.service"},
    {"call": "start", "unit": ["mmd-model-prey@0.service"]},
    {"call": "start", "unit": "\ud800"},
    {"call": "start", "unit": UNIT, "mode": "isolate"},
    {"call": "read", "unit": "dbus.service"},
    {"call": "kill", "unit": UNIT, "whom": "all", "signal": 19},
    {"call": "reload_daemon"},
    {"call": "StartTransientUnit", "unit": UNIT},
    {"call": "list", "id": True},
]


def test_hostile_requests_are_refused_and_the_connection_stays(prey: Installation, broker: Broker) -> None:
    before = prey.show(UNIT, "InvocationID")
    for request in HOSTILE:
        assert broker.ask(**request)["error"] == "org.freedesktop.DBus.Error.InvalidArgs", request
    for line in (b"\x00\xff", b"[" * 2000, b"{}", b"null", b"", b'{"id":1,"id":2}'):
        broker.send(line + b"\n")
        assert broker.reply()["error"] == "org.freedesktop.DBus.Error.InvalidArgs", line
    assert broker.ask(call="read", unit=UNIT)["value"]["active_state"] == "active"
    assert prey.show(UNIT, "InvocationID") == before


def test_a_line_without_an_end_ends_the_connection(prey: Installation, broker: Broker) -> None:
    broker.send(b"x" * 70_000)
    assert "lost" in broker.read()
    with contextlib.suppress(ConnectionResetError):  # for what it has not read
        assert broker.rest() == b""
    again = Broker(prey)
    assert again.ask(call="list")["value"]
    again.close()


@pytest.mark.parametrize("folder", ["/etc/systemd/system", "/run/systemd/transient", "/run/systemd/system"])
def test_units_that_are_only_named_like_models_are_left_alone(prey: Installation, broker: Broker, folder: str) -> None:
    unit, path = "mmd-model-alike@0.service", f"{folder}/mmd-model-alike@.service"
    prey.write(path, "[Service]\nExecStart=/bin/sleep infinity\n")
    prey.systemctl("daemon-reload")
    try:
        assert broker.ask(call="start", unit=unit)["error"] == "org.freedesktop.DBus.Error.AccessDenied"
        assert prey.show(unit, "ActiveState") == "inactive"
        prey.systemctl("start", unit)
        kill = {"call": "kill", "unit": unit, "whom": "all", "signal": 9}
        for request in ({"call": "stop", "unit": unit}, {"call": "restart", "unit": unit}, kill):
            assert broker.ask(**request)["error"] == "org.freedesktop.DBus.Error.AccessDenied"
        assert prey.show(unit, "ActiveState") == "active"
    finally:
        prey.systemctl("stop", unit)
        prey.path(path).unlink()
        prey.systemctl("daemon-reload")


def test_models_run_without_polkit(prey: Installation) -> None:
    prey.systemctl("mask", "--runtime", "--now", "polkit.service")
    try:
        for verb in ("stop", "start"):
            prey.ctl(verb, "prey")
        prey.ctl("stop", "prey")
        assert prey.show(UNIT, "ActiveState") == "inactive"
    finally:
        prey.systemctl("unmask", "--runtime", "polkit.service")


def test_a_model_that_lost_its_template_is_stopped(prey: Installation, broker: Broker) -> None:
    prey.systemctl("stop", "mmd-gateway.service")  # it would stop it by itself
    prey.configure("gpus: {provider: sim, devices: [{memory: 24GiB}]}\n")
    assert prey.show(UNIT, "LoadState") == "not-found"
    assert "job" in broker.ask(call="stop", unit=UNIT)
    prey.wait_until(lambda: prey.show(UNIT, "ActiveState") == "inactive")
