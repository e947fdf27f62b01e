"""What hostile processes write to the journal: nobody's log shows it as another's, and it drives no terminal.

And who reads the journal: the gateway sees what mmd's units wrote, by a reader that may see all.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from testbed import Installation

MARK = "FORGED-LINE"
ENGINE = """
import http.server, os, socket, sys
sys.stdout.write("own words\\n<0>emergency of mine\\n\\x1b]0;PWNED\\x07\\x1b[2Jcleared\\n")
sys.stdout.flush()
journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
fields = "MESSAGE=FORGED-LINE of the engine\\nMMD_MODEL=prey\\nMMD_ROLE=gateway\\nUNIT=mmd-model-prey@0.service\\n"
journal.sendto(fields.encode(), "/run/systemd/journal/socket")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
models:
  prey: {engine: sim, vram: 1GiB, sim: {load_time: 10ms}}
  hostile: {engine: command, gpus: 0, command: [python3, /usr/local/lib/hostile.py, "{port}"], health: {path: /}}
"""


@pytest.fixture(scope="module")
def noisy(installation: Installation) -> Iterator[Installation]:
    """A model, a hostile engine that has logged in its name, and a local user who has as well."""
    installation.write("/usr/local/lib/hostile.py", ENGINE)
    # Engines do not see the journal's socket (test_engine_isolation.py). One to which an operator has shown it forges nothing.
    shown = "[Service]\nBindPaths=/run/systemd/journal/socket\n"
    installation.write("/etc/systemd/system/mmd-model-hostile@.service.d/journal.conf", shown)
    installation.configure(MODELS)
    installation.systemctl("start", "mmd-model-prey@0.service", "mmd-model-hostile@cpu.service")
    forged = (
        f"MESSAGE={MARK} of a user",
        "MMD_MODEL=prey",
        "MMD_ROLE=model",
        "UNIT=mmd-model-prey@0.service",
        "SYSLOG_IDENTIFIER=mmd-prey",
    )
    installation.run("logger", "--journald", user="eve", input="\n".join(forged) + "\n")
    installation.wait_until(lambda: installation.journal().count(MARK) == 2)
    yield installation
    installation.stop_all()
    installation.run("rm", "-r", "/etc/systemd/system/mmd-model-hostile@.service.d")


def admin_log(noisy: Installation, query: str) -> list[dict[str, Any]]:
    url = f"http://localhost/api/v1/logs?{query}"
    text = noisy.run("curl", "-sN", "--max-time", "20", "--unix-socket", "/run/mmd/admin.sock", url).stdout
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def followed(noisy: Installation, model: str) -> str:
    return noisy.run("timeout", "3", "mmdctl", "logs", "-f", "-n", "1000", model, check=False).stdout


def test_nobody_logs_in_anothers_name(noisy: Installation) -> None:
    shown = [noisy.ctl("logs", "prey").stdout, followed(noisy, "prey"), json.dumps(admin_log(noisy, "model=prey"))]
    assert all("Started" in text and "mmd-prey" in text for text in shown)
    assert [text for text in shown if MARK in text] == []
    own = json.dumps(admin_log(noisy, "model=hostile"))
    assert f"{MARK} of the engine" in own, "as its own words it may"
    everything = admin_log(noisy, "lines=10000")
    assert [each for each in everything if f"{MARK} of a user" in str(each["message"])] == []
    assert {each["model"] for each in everything if MARK in str(each["message"])} == {"hostile"}
    assert {str(each["unit"]).startswith("mmd-") for each in everything} == {True}


def test_an_engine_raises_no_emergency_and_drives_no_terminal(noisy: Installation) -> None:
    priorities = {each["priority"] for each in admin_log(noisy, "model=hostile") if "emergency" in str(each["message"])}
    assert priorities == {6}
    live = followed(noisy, "hostile")
    for text in (noisy.ctl("logs", "hostile").stdout, live, noisy.ctl("status").stdout):
        assert "own words" in text or "hostile" in text
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "\\x1b]0;PWNED\\x07\\x1b[2Jcleared" in live


def test_the_gateway_may_not_read_the_journal(noisy: Installation) -> None:
    noisy.ctl("status")  # starts it
    group = int(noisy.run("getent", "group", "systemd-journal").stdout.split(":")[2])
    pid = noisy.show("mmd-gateway.service", "MainPID")
    (groups,) = (line for line in noisy.read(f"/proc/{pid}/status").splitlines() if line.startswith("Groups:"))
    assert str(group) not in groups.split()
    assert MARK not in noisy.run("journalctl", "--quiet", user="mmd", check=False).stdout


def test_only_the_gateway_reaches_the_reader_and_gets_only_what_is_ours(noisy: Installation) -> None:
    path = "/run/mmd/journal.sock"
    for user in ("mmd-fetch", "eve", "mallory"):
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})"
        assert "PermissionError" in noisy.run("python3", "-c", connect, user=user, check=False).stderr

    def ask(request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as reader:
            reader.settimeout(20)
            reader.connect(str(noisy.path(path)))
            reader.sendall(request + b"\n")
            with reader.makefile("rb") as answer:
                return answer.read()

    right = {"model": "prey", "lines": 1000, "follow": False, "after": ""}
    assert ask(json.dumps(right).encode()).endswith(b'{"end": true}\n')
    for change in (
        {"model": "*"},
        {"model": "x@0.service + _UID=0"},
        {"after": "--file=/etc/shadow"},
        {"lines": 10**9},
        {"x": 1},
    ):
        assert ask(json.dumps({**right, **change}).encode()) == b"", change
    assert ask(b"\xff\x00") == b""
    lines = [json.loads(line) for line in ask(json.dumps({**right, "model": None}).encode()).splitlines()]
    assert {each["unit"].startswith("mmd-") for each in lines[1:-1]} == {True}
    noisy.wait_until(lambda: "journalctl" not in "\n".join(noisy.ps()))
