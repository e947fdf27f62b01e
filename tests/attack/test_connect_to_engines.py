"""A hostile engine that wants the gateway to speak to others for it, and a local user that wants an engine's requests.

The engine serves on what is really its own until it is asked for /become, and then puts something else in its place.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from testbed import Installation

_ENGINE = """
import http.server, json, os, socket, socketserver, sys, threading
path = sys.argv[1]
directory = os.path.dirname(path)
report = directory + "/report.json"
def swap(target, make):
    try: os.unlink(target)
    except FileNotFoundError: pass
    make()
def forge(**fields):
    told = json.load(open(report))
    told.update(fields)
    swap(report, lambda: open(report, "w").write(json.dumps(told)))
WAYS = {
    "registrar": lambda: swap(path, lambda: os.symlink("/run/mmd/registrar.sock", path)),
    "dbus": lambda: swap(path, lambda: os.symlink("/run/dbus/system_bus_socket", path)),
    "other": lambda: swap(path, lambda: os.symlink("/run/mmd-model/good@cpu/engine.sock", path)),
    "endpoint": lambda: forge(endpoint="unix:/run/mmd/registrar.sock"),
    "surrogates": lambda: forge(message="\\ud800", tail=["\\udfff"], failure="died"),
    "fifo": lambda: swap(report, lambda: os.mkfifo(report)),
    "directory": lambda: swap(report, lambda: os.mkdir(report)),
    "shadow": lambda: swap(report, lambda: os.symlink("/etc/shadow", report)),
    "huge": lambda: swap(report, lambda: open(report, "w").write(" " * (10 << 20))),
}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        way = self.path.rpartition("/")[2]
        if way in WAYS: WAYS[way]()
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"ok"); self.close_connection = True
    def log_message(self, *words): pass
    def address_string(self): return ""
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
Server(path, Handler).serve_forever()
"""

_CONFIG = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
models:
  good: {engine: sim, gpus: 0, sim: {load_time: 10ms}}
  evil:
    engine: command
    command: [/usr/bin/python3, /opt/evil.py, "{socket}"]
    listen: unix
    gpus: 0
  port:
    engine: command
    command: [/usr/bin/sleep, "600"]
    listen: "tcp:18765"
    gpus: 0
    health: {command: [/bin/true]}
"""

_EVE = (
    "import socket; s = socket.create_server(('127.0.0.1', 18765)); print('up', flush=True)\\n"
    "while True:\\n c, _ = s.accept(); c.settimeout(2)\\n try: d = c.recv(99)\\n except OSError: d = b''\\n"
    " open('/tmp/eve-got', 'ab').write(d)\\n c.sendall(b'HTTP/1.1 200 OK\\\\r\\\\nContent-Length: 3\\\\r\\\\n\\\\r\\\\neve')"
)


def get(url: str, timeout_s: float = 20) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def chat(machine: Installation) -> int:
    body = json.dumps({"model": "good", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{machine.api}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        status: int = answer.status
    return status


def rss_kib(machine: Installation) -> int:
    status = machine.read(f"/proc/{machine.show('mmd-gateway.service', 'MainPID')}/status")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.fixture
def machine(installed: Installation) -> Iterator[Installation]:
    installed.write("/opt/evil.py", _ENGINE)
    installed.configure(_CONFIG)
    yield installed
    installed.stop_all()


@pytest.mark.attack
@pytest.mark.timeout(150)
def test_whatever_an_engine_puts_in_its_place_the_gateway_speaks_to_nobody_else(machine: Installation) -> None:
    assert get(f"{machine.api}/upstream/evil/hello") == (200, b"ok")
    assert chat(machine) == 200
    before_kib = rss_kib(machine)
    accepted = machine.show("mmd-registrar.socket", "NAccepted")
    for way in ("registrar", "dbus", "other", "endpoint", "surrogates", "fifo", "directory", "shadow", "huge"):
        assert get(f"{machine.api}/upstream/evil/{way}")[0] == 200, way
        if way not in ("registrar", "dbus", "other"):  # a report is read once for each run of the gateway
            machine.systemctl("kill", "-s", "SIGKILL", "mmd-gateway.service")
        begun = time.monotonic()
        machine.wait_until(lambda: get(f"{machine.api}/health", 5)[0] == 200, what=way)
        status, content = get(f"{machine.api}/upstream/evil/again")
        assert (status, content) == (200, b"ok") or status in (502, 503, 504), (way, status, content)
        assert chat(machine) == 200, way
        assert "evil" in machine.ctl("status").stdout, way
        assert get(f"{machine.api}/health", 2)[0] == 200, way
        assert time.monotonic() - begun < 30, way
        machine.run("rm", "-rf", "/run/mmd-model/evil@cpu/report.json")
        machine.systemctl("stop", "mmd-model-evil@cpu.service", check=False)
        machine.ctl("reset", "evil", check=False)  # its own start may have failed: it could not write its report
    assert machine.show("mmd-registrar.socket", "NAccepted") == accepted
    assert rss_kib(machine) < before_kib + (64 << 10)


def test_a_port_that_a_local_user_took_gets_no_request(machine: Installation) -> None:
    machine.run("rm", "-f", "/tmp/eve-got")
    machine.ctl("load", "port", "--wait", check=False, timeout_s=30)
    machine.run(
        "systemd-run", "--quiet", "--unit=eve", "--uid=eve", "/usr/bin/python3", "-c", _EVE.encode().decode("unicode_escape")
    )
    machine.wait_until(lambda: "18765" in machine.run("ss", "-ltn").stdout, what="eve listens")
    status, content = get(f"{machine.api}/upstream/port/secret", 60)
    machine.systemctl("stop", "eve", check=False)
    assert content != b"eve"
    assert status >= 500
    assert not machine.path("/tmp/eve-got").exists() or machine.read("/tmp/eve-got") == ""
