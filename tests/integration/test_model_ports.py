"""Models' own ports under a real systemd: who listens, who hands over, and what goes on meanwhile.

Every test runs twice: with the gateway's one process, and with workers.
"""

import base64
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from client import chat, get, post, stream
from testbed import PROCESSES, Installation, named

_ECHO = """
import socketserver, sys
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
_WEB = """
import sys
from aiohttp import web
async def page(request):
    return web.Response(text=f"{request.method} {request.path_qs} {request.host} {len(await request.read())}")
async def talk(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(message.data.upper())
    return socket
app = web.Application(client_max_size=1 << 30)
app.add_routes([web.get("/ws", talk), web.route("*", "/{path:.*}", page)])
web.run_app(app, path=sys.argv[1], print=None)
"""
_CONNECTS = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).close()"
_MODELS = f"""
gateway: {{workers: WORKERS, loading_keepalive: 200ms}}
gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}
policy: {{min_residency: 0s, max_wait: 500ms}}
models:
  a: {{engine: sim, vram: 14GiB, port: "127.0.0.1:8083", sim: {{load_time: 200ms, wake_time: 100ms, tokens_per_second: 20}}}}
  echo:
    engine: command
    command: [/usr/bin/python3, /opt/ports/echo.py, "{{port}}"]
    health: {{command: [/usr/bin/python3, -c, "{_CONNECTS}", "{{port}}"]}}
    vram: 16GiB
    port: "127.0.0.1:8081"
    port_protocol: tcp
  web:
    engine: command
    command: [/usr/lib/mmd/bin/python, -I, /opt/ports/web.py, "{{socket}}"]
    listen: unix
    gpus: 0
    port: "127.0.0.1:8082"
"""
_GATEWAY = "mmd-gateway.service"

pytestmark = pytest.mark.timeout(120)
_FILE = "/etc/mmd/mmd.yaml"


@pytest.fixture(params=PROCESSES, ids=named)
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.write("/opt/ports/echo.py", _ECHO)
    installed.write("/opt/ports/web.py", _WEB)
    installed.configure(_MODELS.replace("WORKERS", str(request.param)))
    installed.systemctl("start", "mmd-reload.path")
    yield installed
    installed.stop_all()


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=20)


def echoed(connection: socket.socket, text: bytes = b"hello") -> bool:
    connection.sendall(text)
    heard = b""
    while len(heard) < len(text) and (piece := connection.recv(65536)):
        heard += piece
    return heard == text


def state(machine: Installation, name: str) -> str:
    states: dict[str, str] = {model["name"]: model["state"] for model in machine.status()["models"]}
    return states[name]


def refused(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return True
    return False


def upgrade(machine: Installation) -> None:
    before = machine.show(_GATEWAY, "MainPID")
    machine.systemctl("reload", _GATEWAY)
    machine.wait_until(lambda: machine.show(_GATEWAY, "MainPID") != before, 30, "another main process")
    machine.wait_until(lambda: machine.show(_GATEWAY, "ActiveState") == "active", 30)


def test_a_connection_starts_the_model_and_keeps_it_while_it_is_used(machine: Installation) -> None:
    machine.systemctl("stop", _GATEWAY)
    with connect(8081) as connection, ThreadPoolExecutor(1) as pool:
        assert echoed(connection), "the gateway and the model were started"
        assert chat("web").status == 200, "the others are served meanwhile"
        other = pool.submit(chat, "a")
        machine.wait_until(lambda: machine.status()["gateway"]["waiting"] == 1)
        for _ in range(15):
            assert echoed(connection, os.urandom(5000))
            time.sleep(0.1)
        assert state(machine, "echo") in ("ready", "draining")
        assert not other.done(), "there is no room for it beside a model in use"
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "the end goes through and comes back"
        assert other.result(30).status == 200
    assert state(machine, "echo") == "stopped"


def test_a_port_speaks_http(machine: Installation) -> None:
    assert get("/", api="http://127.0.0.1:8082").text == "GET / 127.0.0.1:8082 0"
    assert get("/any/path?x=1%202", api="http://127.0.0.1:8082").text == "GET /any/path?x=1%202 127.0.0.1:8082 0"
    assert post("/upload", os.urandom(20 << 20), api="http://127.0.0.1:8082").text == f"POST /upload 127.0.0.1:8082 {20 << 20}"
    assert state(machine, "web") == "ready"
    messages = [{"role": "user", "content": "hello"}]
    for body in ({"messages": messages}, {"messages": messages, "model": "a"}, {"messages": messages, "model": "gpt-4"}):
        answer = post("/v1/chat/completions", {**body, "max_tokens": 3}, api="http://127.0.0.1:8083")
        assert (answer.status, answer.json["model"]) == (200, "a")
    wrong = post("/v1/chat/completions", {"model": "web", "messages": messages}, api="http://127.0.0.1:8083")
    assert (wrong.status, wrong.error["message"]) == (404, "this port serves a only, and not 'web'")
    assert post("/sleep", {}, api="http://127.0.0.1:8083").status == 404, "engines' control is out of reach"
    assert post("/v1/chat/completions", {"model": "a", "messages": messages}, api="http://127.0.0.1:8001").status == 200
    assert "Port: 127.0.0.1:8081 (tcp)" in machine.ctl("show", "echo").stdout


def test_a_port_speaks_websocket(machine: Installation) -> None:
    key = base64.b64encode(os.urandom(16)).decode()
    with connect(8082) as connection:
        lines = (
            "GET /ws HTTP/1.1",
            "Host: localhost",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
        )
        connection.sendall("\r\n".join((*lines, f"Sec-WebSocket-Key: {key}", "", "")).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1000)
        assert head.startswith(b"HTTP/1.1 101 ")
        connection.sendall(b"\x81\x85\0\0\0\0hello")
        assert connection.recv(100) == b"\x81\x05HELLO"


def test_an_upgrade_keeps_tunnels_and_ports(machine: Installation) -> None:
    with connect(8081) as connection:
        assert echoed(connection)
        kept = http.client.HTTPConnection("127.0.0.1", 8082, timeout=20)
        sockets = set()
        for _ in range(3):
            kept.request("GET", "/")
            assert kept.getresponse().read() == b"GET / 127.0.0.1:8082 0"
            sockets.add(kept.sock)
            upgrade(machine)
            assert echoed(connection, os.urandom(100_000))
            assert machine.status()["gateway"]["in_flight"] == 1, "the successor knows of it"
            with connect(8081) as fresh:
                assert echoed(fresh)
        assert len(sockets) == 1, "it was never closed"
        kept.close()
    machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 0)
    machine.wait_until(lambda: sum("bin/mmd-gateway" in line for line in machine.ps()) == 1, 20)


def test_ports_come_move_and_go_while_others_go_on(machine: Installation) -> None:
    assert chat("a").status == 200
    pid = machine.show(_GATEWAY, "MainPID")
    text = machine.read(_FILE)
    with ThreadPoolExecutor(1) as pool, connect(8082) as kept:
        enough = Event()
        answer = pool.submit(lambda: _read_until("a", enough))
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 1)
        # One that is new.
        machine.write(_FILE, text + '  tiny: {engine: sim, gpus: 0, port: "127.0.0.1:8084", sim: {load_time: 100ms}}\n')
        machine.wait_until(lambda: not refused(8084), 20)
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        assert post("/v1/chat/completions", body, api="http://127.0.0.1:8084").json["model"] == "tiny"
        # Two that change places, with one that has been in use.
        kept.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        swapped = text.replace("8082", "X").replace("8083", "8082").replace("X", "8083")
        machine.write(_FILE, swapped)
        machine.wait_until(lambda: refused(8084), 20, "the new one has gone again")
        machine.wait_until(lambda: machine.show("mmd-port-web.socket", "ActiveState") == "active", 20)
        machine.wait_until(lambda: get("/", api="http://127.0.0.1:8083").text == "GET / 127.0.0.1:8083 0", 20)
        assert post("/v1/chat/completions", body, api="http://127.0.0.1:8082").json["model"] == "a"
        # Another protocol on the same address.
        machine.write(_FILE, swapped.replace("port_protocol: tcp", "port_protocol: http"))
        machine.wait_until(lambda: json.loads(machine.ctl("show", "echo", "--json").stdout)["port_protocol"] != "tcp", 20)
        enough.set()
        events = answer.result(60)
        assert len(events) > 20
        assert all(event["choices"][0]["finish_reason"] is None for event in events), "it goes on"
    assert machine.show(_GATEWAY, "MainPID") == pid, "all in one process"


def _read_until(model: str, enough: Event) -> list[Any]:
    """The events of a stream, to the first one after `enough`."""
    events = []
    lines = stream(model, max_tokens=100_000, timeout_s=5, ignore_eos=True)
    for line in lines:
        if line.startswith("data: "):
            events.append(json.loads(line.removeprefix("data: ")))
            if enough.is_set():
                break
    lines.close()  # type: ignore[attr-defined]
    return events


def test_a_model_is_added_with_a_port_and_requests_at_it_are_cancelled(machine: Installation) -> None:
    sim = ("--engine", "sim", "--gpus", "0", "--set", "sim={load_time: 100ms, tokens_per_second: 20}")
    taken = machine.run("mmdctl", "add", "none", *sim, "--port", "127.0.0.1:8082", check=False)
    assert taken.returncode == 1
    assert "127.0.0.1:8082" in taken.stderr
    machine.ctl("add", "more", *sim, "--port", "127.0.0.1:8085")
    connection = http.client.HTTPConnection("127.0.0.1", 8085, timeout=20)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"X-Request-Id": "my-own"})
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("X-Request-Id")) == (200, "my-own")
    while not answer.readline().startswith(b"data: "):  # comments, while the model loads
        pass
    (listed,) = json.loads(machine.ctl("requests", "--json").stdout)
    assert (listed["model"], listed["client_id"], listed["state"]) == ("more", "my-own", "answering")
    machine.ctl("cancel", listed["id"])
    assert b"cancelled_by_operator" in answer.read()
    connection.close()
    machine.ctl("remove", "more")
    machine.wait_until(lambda: refused(8085), 20)


def test_units_can_be_driven_by_hand_and_a_killed_gateway_comes_back(machine: Installation) -> None:
    with connect(8081) as connection:
        assert echoed(connection)
        machine.systemctl("restart", "mmd-port-echo.socket")
        assert echoed(connection), "connections are not the socket's"
        with connect(8081) as other:
            assert echoed(other)
        machine.systemctl("stop", "mmd-port-echo.socket")
        assert refused(8081)
        assert echoed(connection)
        machine.systemctl("start", "mmd-gateway.socket")
        machine.wait_until(lambda: not refused(8081), what="it brings the ports along, and systemctl waits for itself only")
        with connect(8081) as other:
            assert echoed(other)
    machine.systemctl("kill", "--kill-whom=main", "--signal=KILL", _GATEWAY)
    with connect(8081) as connection:
        assert echoed(connection)
    machine.systemctl("restart", _GATEWAY)
    with connect(8081) as connection:
        assert echoed(connection)
    machine.systemctl("stop", "mmd-gateway.socket")
    assert refused(8081)
    machine.systemctl("start", "mmd-gateway.socket")


def test_a_model_that_does_not_start_ends_the_connection_and_not_the_port(machine: Installation) -> None:
    good = machine.read("/opt/ports/echo.py")
    machine.write("/opt/ports/echo.py", "raise SystemExit('no such luck')\n")
    with connect(8081) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    machine.wait_until(lambda: "a connection to the port of echo is closed" in machine.journal("-u", _GATEWAY))
    machine.write("/opt/ports/echo.py", good)
    machine.ctl("reset", "echo")
    with connect(8081) as connection:
        assert echoed(connection)
