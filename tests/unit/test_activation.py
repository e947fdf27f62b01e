"""mmd.systemd.activation in child processes whose descriptors 3, 4, ... are what systemd would pass."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmd.systemd.activation import listen_sockets

# Moves the descriptors in argv[1] to 3, 4, ... and takes LISTEN_* from argv[2], where PID stands for its own.
CHILD = """
import fcntl, json, os, sys
from mmd.errors import MmdError
from mmd.systemd.activation import listen_sockets
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in json.loads(sys.argv[1])]
for target, fd in enumerate(high, 3):
    os.dup2(fd, target, inheritable=True)
    os.close(fd)
environ = {key: value.replace("PID", str(os.getpid())) for key, value in json.loads(sys.argv[2]).items()}
try:
    found = listen_sockets(environ)
except MmdError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "sockets": [[s.name, s.socket.fileno(), s.family.name, str(s.socket.getsockname())] for s in found],
        "inheritable": [s.socket.fileno() for s in found if os.get_inheritable(s.socket.fileno())],
        "environ": environ,
        "again": len(listen_sockets(environ)),
    }))
    for s in found:
        s.socket.close()
"""


def child(fds: Sequence[int], environ: Mapping[str, str]) -> dict[str, Any]:
    argv = [sys.executable, "-W", "error", "-c", CHILD, json.dumps(list(fds)), json.dumps(dict(environ))]
    done = subprocess.run(argv, pass_fds=fds, capture_output=True, text=True, check=True, timeout=20)
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_names_repeat(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket() as other:
        unix.bind(str(tmp_path / "admin.sock"))
        unix.listen()
        other.bind(("127.0.0.1", 0))
        other.listen()
        environ = {"LISTEN_PID": "PID", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "api:admin:api", "OTHER": "stays"}
        answer = child([tcp.fileno(), unix.fileno(), other.fileno()], environ)
        assert answer["sockets"] == [
            ["api", 3, "AF_INET", str(tcp.getsockname())],
            ["admin", 4, "AF_UNIX", unix.getsockname()],
            ["api", 5, "AF_INET", str(other.getsockname())],
        ]
    assert answer["inheritable"] == []
    assert answer["environ"] == {"OTHER": "stays"}
    assert answer["again"] == 0


def test_without_names() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        answer = child([tcp.fileno()], {"LISTEN_PID": "PID", "LISTEN_FDS": "1"})
    assert [entry[0] for entry in answer["sockets"]] == ["unknown"]


def test_meant_for_another_process() -> None:
    environ = {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "api"}
    assert listen_sockets(environ) == ()
    assert environ == {}, "removed all the same"


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid())}])
def test_nothing_passed(environ: dict[str, str]) -> None:
    assert listen_sockets(environ) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LISTEN_FDS": "one"}, "LISTEN_FDS=one is not a number"),
        ({"LISTEN_FDNAMES": "api:admin"}, "names 2 descriptors, LISTEN_FDS=1 passes 1"),
        ({"LISTEN_FDS": "2"}, "inherited descriptor 4 is no socket: Bad file descriptor"),
    ],
)
def test_contradictions(changes: dict[str, str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        answer = child([tcp.fileno()], {"LISTEN_PID": "PID", "LISTEN_FDS": "1"} | changes)
    assert message in answer["error"]


def test_not_listening() -> None:
    with socket.socket() as tcp:
        answer = child([tcp.fileno()], {"LISTEN_PID": "PID", "LISTEN_FDS": "1"})
    assert "inherited socket 3 does not listen" in answer["error"]


def test_not_a_socket() -> None:
    with Path("/dev/null").open() as null:
        answer = child([null.fileno()], {"LISTEN_PID": "PID", "LISTEN_FDS": "1"})
    assert "inherited descriptor 3 is no socket" in answer["error"]
