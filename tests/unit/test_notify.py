"""mmd.systemd.notify against a datagram socket that stands in for systemd's."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmd.systemd.notify import STATUS_LIMIT, Notifier, watchdog_interval_s


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as received:
        received.bind(str(tmp_path / "notify"))
        received.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield received


@pytest.fixture
def errors() -> list[str]:
    return []


@pytest.fixture
def notifier(manager: socket.socket, errors: list[str]) -> Iterator[Notifier]:
    with_socket = Notifier(report=errors.append)
    yield with_socket
    with_socket.close()


def test_messages(manager: socket.socket, notifier: Notifier, errors: list[str]) -> None:
    notifier.ready()
    notifier.extend(12.5)
    notifier.watchdog()
    notifier.stopping()
    assert [manager.recv(999) for _ in range(4)] == [b"READY=1", b"EXTEND_TIMEOUT_USEC=12500000", b"WATCHDOG=1", b"STOPPING=1"]
    assert errors == []


def test_reloading(manager: socket.socket, notifier: Notifier) -> None:
    notifier.reloading()
    match = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", manager.recv(999))
    assert match is not None
    assert 0 <= time.clock_gettime(time.CLOCK_MONOTONIC) - int(match[1]) / 1e6 < 5


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("loading weights 45 %", "loading weights 45 %"),
        ("wake \u2713 \xe9t\xe9", "wake ? ?t?"),
        (" two\nlines\r\n\tREADY=1\n", "two lines READY=1"),
        ("\x1b[31mred\x00", "?[31mred?"),
        ("", ""),
        ("x" * 500, "x" * STATUS_LIMIT),
    ],
)
def test_status_is_one_line_of_ascii(manager: socket.socket, notifier: Notifier, text: str, status: str) -> None:
    notifier.status(text)
    assert manager.recv(999) == b"STATUS=" + status.encode()


def test_without_systemd(monkeypatch: pytest.MonkeyPatch, errors: list[str]) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier(report=errors.append)
    notifier.ready()
    notifier.status("on its own")
    assert errors == []


# sdnotify drops its socket without closing it when it cannot connect.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_socket_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[str]) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "missing"))
    Notifier(report=errors.append).ready()
    assert len(errors) == 1
    assert "No such file or directory" in errors[0]


def test_an_error_is_reported_once(
    manager: socket.socket, notifier: Notifier, errors: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    to_stderr = Notifier()
    manager.close()
    for _ in range(3):
        notifier.watchdog()
        to_stderr.watchdog()
    to_stderr.close()
    assert len(errors) == 1
    assert capsys.readouterr().err.count("<4>cannot notify systemd: Connection refused") == 1


def test_a_busy_systemd_stalls_only_what_must_arrive(manager: socket.socket, notifier: Notifier, errors: list[str]) -> None:
    began = time.monotonic()
    while not errors:
        notifier.watchdog()
    assert "Resource temporarily unavailable" in errors[0]
    assert time.monotonic() - began < 2
    received: list[bytes] = []

    def wake_up() -> None:
        while b"READY=1" not in received:
            received.append(manager.recv(999))

    later = threading.Timer(0.2, wake_up)
    later.start()
    notifier.ready()
    later.join()
    assert set(received) == {b"WATCHDOG=1", b"READY=1"}


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(environ) == interval_s


def test_it_is_light() -> None:
    """mmd-runner stays resident beside every model."""
    program = "import sys, mmd.systemd.notify; print(*{'asyncio', 'logging', 'dataclasses', 'json'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.split() == []
