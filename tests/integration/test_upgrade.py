"""`systemctl reload`: a fresh gateway takes over the sockets, the old one finishes its answers, and nobody notices.

Every test runs twice: with the gateway's one process, and with workers.
"""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from client import chat, stream
from testbed import Installation

_MODELS = """
gateway: {loading_keepalive: 200ms, workers: WORKERS}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s, max_wait: 500ms}
defaults: {engine: sim}
models:
  a: {vram: 14GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 20}}
  b: {vram: 16GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 500}}
  slow: {vram: 2GiB, sim: {load_time: 3s, tokens_per_second: 500}}
"""
_GATEWAY = "mmd-gateway.service"
_UPGRADES = 20


@pytest.fixture(params=[1, 2], ids=["alone", "workers"])
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.configure(_MODELS.replace("WORKERS", str(request.param)))
    yield installed
    installed.stop_all()


def main_pid(machine: Installation) -> str:
    return machine.show(_GATEWAY, "MainPID")


def upgrade(machine: Installation) -> None:
    """`systemctl reload`, and wait until the fresh process is the main one and ready."""
    before = main_pid(machine)
    machine.systemctl("reload", _GATEWAY)
    machine.wait_until(lambda: main_pid(machine) != before, 30, "another main process")
    machine.wait_until(lambda: machine.show(_GATEWAY, "ActiveState") == "active", 30)


def gateways(machine: Installation) -> int:
    return sum("bin/mmd-gateway" in line for line in machine.ps())


def only_one(machine: Installation) -> None:
    machine.wait_until(lambda: gateways(machine) == 1, what="the old processes end with their last answer")
    workers = machine.status()["gateway"]["workers"]
    relays = [line for line in machine.ps() if "mmd.gateway.workers" in line]
    assert len(relays) == (workers if workers > 1 else 0), "theirs with them"


def content(lines: list[str]) -> list[str]:
    """The tokens of a streamed answer, which must be whole."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]", events[-3:]
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert choices[-1]["finish_reason"] == "length"
    return [choice["delta"]["content"] for choice in choices if choice["delta"].get("content")]


def test_a_stream_outlives_upgrades_and_its_model_stays_awake(machine: Installation) -> None:
    assert chat("a").status == 200
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(lambda: list(stream("a", max_tokens=240, ignore_eos=True)))
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 1)
        for _ in range(3):
            upgrade(machine)
            assert machine.status()["gateway"]["in_flight"] == 1, "the successor knows of what the old one serves"
        other = pool.submit(chat, "b")
        machine.wait_until(lambda: machine.status()["gateway"]["waiting"] == 1)
        time.sleep(1)  # twice max_wait: an idle model would have left
        assert not answer.done()
        states = {model["name"]: model["state"] for model in machine.status()["models"]}
        assert states["a"] in ("ready", "draining"), states
        assert len(content(answer.result(30))) == 240
        assert other.result(30).status == 200
    only_one(machine)
    assert "OutOfMemory" not in machine.journal("MMD_ROLE=model")


def test_an_idle_connection_moves_on(machine: Installation) -> None:
    chat("b")
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    body = json.dumps({"model": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})
    sockets = set()
    for _ in range(3):
        for method, path, data in (("POST", "/v1/chat/completions", body), ("GET", "/v1/models", None)):
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
            sockets.add(connection.sock)
        upgrade(machine)
    assert len(sockets) == 1, "it was never closed"
    connection.close()
    only_one(machine)


def test_a_request_that_waits_moves_on_with_its_comments(machine: Installation) -> None:
    lines: list[str] = []

    def collect() -> None:
        lines.extend(stream("slow", max_tokens=5, ignore_eos=True))

    with ThreadPoolExecutor(2) as pool:
        streamed, plain = pool.submit(collect), pool.submit(chat, "slow")
        machine.wait_until(lambda: machine.status()["gateway"]["waiting"] == 2)
        time.sleep(0.5)  # the comments have begun
        upgrade(machine)
        assert machine.status()["gateway"]["waiting"] == 2
        streamed.result(30)
        assert plain.result(30).status == 200
    assert any(line.startswith(": slow is starting") for line in lines)
    assert len(content(lines)) == 5
    only_one(machine)


def test_operations_under_way_are_told_to_ask_again(machine: Installation) -> None:
    assert chat("a").status == 200
    with ThreadPoolExecutor(3) as pool:
        answer = pool.submit(lambda: list(stream("a", max_tokens=60, ignore_eos=True)))
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 1)
        starting = pool.submit(machine.ctl, "start", "slow", check=False)
        sleeping = pool.submit(machine.ctl, "sleep", "a", check=False)
        machine.wait_until(lambda: machine.status()["gateway"]["waiting"] == 1)
        time.sleep(0.3)  # both are under way
        upgrade(machine)
        for operation in (starting, sleeping):
            done = operation.result(30)
            assert done.returncode != 0
            assert "replaced meanwhile" in done.stdout + done.stderr
        assert len(content(answer.result(30))) == 60
    only_one(machine)


def test_a_half_sent_request_moves_on(machine: Installation) -> None:
    chat("b")
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    connection.connect()
    body = json.dumps({"model": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    whole = head + body
    for cut in (10, len(head) + 5, len(whole)):
        start = {10: 0, len(head) + 5: 10, len(whole): len(head) + 5}[cut]
        connection.sock.sendall(whole[start:cut])
        time.sleep(0.1)
        if cut < len(whole):
            upgrade(machine)
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    assert answer.status == 200
    connection.close()


def test_a_fresh_process_that_does_not_come_up_changes_nothing(machine: Installation) -> None:
    chat("b")
    before = main_pid(machine)
    good = machine.read("/etc/mmd/mmd.yaml")
    machine.systemctl("stop", "mmd-reload.path")
    try:
        machine.write("/etc/mmd/mmd.yaml", good + "\n  broken: {vramm: 1GiB}\n")
        machine.run("systemctl", "reload", _GATEWAY, check=False)
        machine.systemctl("kill", "--kill-whom=main", "--signal=USR2", _GATEWAY)
        machine.wait_until(lambda: "the gateway goes on as it is" in machine.journal("-u", _GATEWAY), 30)
        assert main_pid(machine) == before
        only_one(machine)
        assert chat("b").status == 200
        assert chat("a").status == 200, "it decides again"
    finally:
        machine.write("/etc/mmd/mmd.yaml", good)
        machine.systemctl("start", "mmd-reload.path")


@pytest.mark.timeout(180)
def test_twenty_upgrades_under_load_lose_nothing(machine: Installation) -> None:
    chat("b")
    over, outcomes, slowest = threading.Event(), Counter[str](), [0.0]

    def repeat(ask: Callable[[], str]) -> None:
        while not over.is_set():
            begun = time.monotonic()
            try:
                outcome = ask()
            except (OSError, AssertionError, http.client.HTTPException) as error:
                outcome = repr(error)
            outcomes[outcome] += 1
            slowest[0] = max(slowest[0], time.monotonic() - begun)
            time.sleep(0.01)

    kept = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    body = json.dumps({"model": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})

    def over_a_kept_connection() -> str:
        first = kept.sock
        kept.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = kept.getresponse()
        answer.read()
        assert first is None or kept.sock is first, "closed"
        return f"kept {answer.status}"

    asks = (
        over_a_kept_connection,
        lambda: f"new {chat('b').status}",
        lambda: f"stream {len(content(list(stream('b', max_tokens=100, ignore_eos=True))))}",
    )
    with ThreadPoolExecutor(len(asks)) as pool:
        futures = [pool.submit(repeat, ask) for ask in asks]
        try:
            for _ in range(_UPGRADES):
                upgrade(machine)
        finally:
            over.set()
        for future in futures:
            future.result()
    kept.close()
    print(outcomes, f"slowest {slowest[0]:.2f} s")
    assert set(outcomes) == {"kept 200", "new 200", "stream 100"}, outcomes
    assert all(count > _UPGRADES for count in outcomes.values()), outcomes
    assert slowest[0] < 5, "nobody waits for an upgrade"
    only_one(machine)
