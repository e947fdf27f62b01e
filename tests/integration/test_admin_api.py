"""The admin API of an installed gateway: what needs systemd, the journal, the state directory and an upgrade.

Every test runs twice: with the gateway's one process, and with workers. The rest is in tests/unit/test_admin*.py.
"""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from client import Answer, chat, get, post, stream
from testbed import PROCESSES, Installation, named

_MODELS = """
gateway: {workers: WORKERS, admin_auth: AUTH}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
defaults: {engine: sim, env: {TOKEN: secret-token}}
models:
  demo/a: {id: a, vram: 14GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 20}}
  b: {vram: 16GiB, sim: {load_time: 200ms, wake_time: 100ms, tokens_per_second: 500}}
"""
_ADMIN = "http://127.0.0.1:8001"
_GATEWAY = "mmd-gateway.service"
_A = "/api/v1/models/demo%2Fa"


@pytest.fixture(params=PROCESSES, ids=named)
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.configure(_MODELS.replace("WORKERS", str(request.param)).replace("AUTH", "open"))
    installed.systemctl("restart", _GATEWAY)
    yield installed
    installed.stop_all()


def admin(path: str) -> Any:
    """The JSON of an answer that must be 200."""
    answer = get(path, api=_ADMIN)
    assert answer.status == 200, answer.text
    return answer.json


def operate(path: str) -> dict[str, Any]:
    """The last line of an operation, which must be a success."""
    answer = post(path, b"", api=_ADMIN)
    assert answer.status == 200, answer.text
    last: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
    assert last["ok"], last
    return last


def delete(path: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", 8001, timeout=10)
    try:
        connection.request("DELETE", path)
        answer = connection.getresponse()
        return Answer(answer.status, {}, answer.read().decode())
    finally:
        connection.close()


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


class Followed:
    """The events of a stream, read by a thread until it ends."""

    def __init__(self, path: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", 8001, timeout=60)
        self.connection.request("GET", path)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        while line := self.answer.readline():
            self.lines.append(line.decode())

    @property
    def events(self) -> list[dict[str, Any]]:
        return events_of("".join(self.lines))


@contextmanager
def followed(path: str) -> Iterator[Followed]:
    found = Followed(path)
    try:
        yield found
    finally:
        sock = found.connection.sock
        if sock is not None:
            sock.shutdown(2)
        found.thread.join(10)
        found.answer.close()
        found.connection.close()
        assert not found.thread.is_alive()


def upgrade(machine: Installation) -> None:
    before = machine.show(_GATEWAY, "MainPID")
    machine.systemctl("reload", _GATEWAY)
    machine.wait_until(lambda: machine.show(_GATEWAY, "MainPID") != before, 30, "another main process")
    machine.wait_until(lambda: machine.show(_GATEWAY, "ActiveState") == "active", 30)


def test_a_pin_holds_through_an_upgrade_a_restart_and_until_unpinned(machine: Installation) -> None:
    operate(f"{_A}/start")
    operate(f"{_A}/pin")
    for change in (None, upgrade, lambda machine: machine.systemctl("restart", _GATEWAY)):
        if change is not None:
            change(machine)
        assert admin(_A)["pinned"]
        assert "held by pinned models" in chat("b").error["message"]
    assert machine.ctl("unpin", "demo/a").stdout.startswith("demo/a: is not pinned")
    assert chat("b").status == 200
    assert admin(_A)["state"] == "sleeping"


def test_a_stream_is_listed_and_cancelled(machine: Installation) -> None:
    operate(f"{_A}/start")
    lines = stream("demo/a", max_tokens=1000, ignore_eos=True)
    assert next(lines).startswith("data: ")
    (line,) = machine.ctl("requests").stdout.splitlines()[1:]
    assert line.split()[1:3] == ["demo/a", "answering"]
    number = line.split()[0]
    assert machine.ctl("cancel", number).stdout == f"{number}: cancelled; it was answering, for demo/a\n"
    told = [text.removeprefix("data: ") for text in lines if text.startswith("data: ")]
    assert json.loads(told[-2])["error"]["code"] == "cancelled_by_operator"
    assert told[-1] == "[DONE]"
    machine.wait_until(lambda: admin(_A)["in_flight"] == 0, what="the engine is free again")
    assert admin("/api/v1/requests") == {"requests": []}
    assert delete(f"/api/v1/requests/{number}").status == 404
    assert machine.ctl("cancel", number, check=False).returncode == 1


def test_events_say_who_makes_room_for_whom_and_go_on_after_an_upgrade(machine: Installation) -> None:
    assert chat("demo/a").status == 200
    with followed("/api/v1/events?follow=true&lines=0") as found:
        assert chat("b").status == 200
        machine.wait_until(lambda: any(each.get("state") == "ready" for each in found.events))
        evicted = next(each for each in found.events if each["type"] == "evicted")
        assert (evicted["model"], evicted["makes_room_for"], evicted["level"]) == ("demo/a", "b", 1)
        ended = {each["action"]: each for each in found.events if each["type"] == "action_ended"}
        assert ended["sleep"]["ok"]
        assert ended["sleep"]["freed_bytes"] > 12 << 30
        assert ended["start"]["elapsed_s"] > 0.1
        why = {each["action"]: each["why"] for each in found.events if each["type"] == "action_begun"}
        assert why == {"sleep": "it makes room for b", "start": "requests wait for it (1)"}
        upgrade(machine)
        found.thread.join(10)
        assert not found.thread.is_alive(), "the stream ends, so that its client comes back"
        assert found.events[-1]["type"] == "gateway_replaced"
    (started,) = [each for each in events_of(get("/api/v1/events", api=_ADMIN).text) if each["type"] == "gateway_started"]
    assert str(started["pid"]) == machine.show(_GATEWAY, "MainPID")
    shown = machine.ctl("events", "-n", "1").stdout
    assert len(shown.splitlines()) == 1


def test_the_gateway_stops_although_somebody_follows(machine: Installation) -> None:
    with followed("/api/v1/events?follow=true"), followed("/api/v1/logs?follow=true"):
        begun = time.monotonic()
        machine.systemctl("stop", _GATEWAY)
        assert time.monotonic() - begun < 10, "gateway.drain_timeout is five minutes"
    assert not [line for line in machine.ps() if "journalctl" in line]


def test_logs_of_one_model_and_of_all(machine: Installation) -> None:
    operate(f"{_A}/start")
    of_model = events_of(get("/api/v1/logs?model=demo/a", api=_ADMIN).text)
    assert {each["model"] for each in of_model} == {"a", ""}
    assert any(each["unit"] == "mmd-model-a@0.service" and "Started" in each["message"] for each in of_model)
    everything = events_of(get("/api/v1/logs?lines=1000", api=_ADMIN).text)
    assert any(each["identifier"] == "mmd-gateway" for each in everything)
    with followed("/api/v1/logs?model=demo/a&follow=true&lines=0") as found:
        operate(f"{_A}/stop")
        machine.wait_until(lambda: any("Stopped" in each["message"] for each in found.events))


def test_the_configuration_is_checked_and_shown_without_secrets(machine: Installation) -> None:
    shown = get("/api/v1/config", api=_ADMIN)
    assert shown.json["models"]["demo/a"]["env"] == {"TOKEN": "(hidden)"}
    assert "secret-token" not in shown.text
    checked = post("/api/v1/config/check", b"", api=_ADMIN).json
    (warning,) = checked.pop("warnings")
    assert checked == {"ok": True, "models": 2, "gpus": 1, "problems": []}
    assert warning["key"] == "models.demo/a.env.TOKEN"
    yaml = {"Content-Type": "application/yaml"}
    wrong = post("/api/v1/config/check", b"models: {x: {engine: sim, vrma: 1}}", api=_ADMIN, headers=yaml).json
    assert (wrong["ok"], wrong["problems"][0]["key"]) == (False, "models.x.vrma")


def test_over_tcp_what_changes_or_is_private_needs_more(installed: Installation) -> None:
    installed.configure(_MODELS.replace("WORKERS", "1").replace("AUTH", "key"))
    try:
        for path in ("/api/v1/logs", "/api/v1/config", "/api/v1/requests"):
            assert get(path, api=_ADMIN).status == 403
        for path in (f"{_A}/start", f"{_A}/pin", "/api/v1/reload", "/api/v1/config/check"):
            assert post(path, b"", api=_ADMIN).status == 403
        assert delete("/api/v1/requests/x-1").status == 403
        for path in ("status", "models", "gpus", "queue", "events", "openapi.json"):
            assert get(f"/api/v1/{path}", api=_ADMIN).status == 200
        assert get("/api/v1/status").status == 404, "the API's own port knows none of it"
    finally:
        installed.stop_all()
