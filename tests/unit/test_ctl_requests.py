"""`mmdctl requests`, `cancel`, `events`, `pin`: what is asked of the gateway, and what people see."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ctl_gateway import Gateway, example, serving

from mmd.status import ModelState, Progress, RequestStatus

MMDCTL = Path(sys.executable).with_name("mmdctl")


def run(path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [str(MMDCTL), "--socket", str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def gateway() -> Gateway:
    now = time.time()
    waiting = RequestStatus(
        "ab12cd-7", "", "demo/qwen-7b", "POST", "/v1/chat/completions", "waiting", now - 75, True, "127.0.0.1:40112"
    )
    answering = RequestStatus(
        "ab12cd-9", "mine", "demo/llama-8b", "POST", "/v1/responses", "answering", now - 30, True, "unix", 1234, 56, "alice"
    )
    return Gateway(example(now), requests=(waiting, answering))


def test_requests_are_a_table(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with serving(gateway, path):
        result = run(path, "requests")
        as_json = run(path, "requests", "--json")
    titles, first, second = result.stdout.splitlines()
    assert titles.split() == ["ID", "MODEL", "STATE", "AGE", "SENT", "TOKENS", "PATH", "CLIENT", "KEY", "CLIENT'S", "ID"]
    assert first.split() == ["ab12cd-7", "demo/qwen-7b", "waiting", "1", "min", "/v1/chat/completions", "127.0.0.1:40112"]
    assert second.split()[4:] == ["s", "1234", "56", "/v1/responses", "unix", "alice", "mine"]
    assert [RequestStatus.from_json(each) for each in json.loads(as_json.stdout)] == list(gateway.requests)


def test_no_requests_are_said_so(gateway: Gateway, tmp_path: Path) -> None:
    gateway.requests = ()
    with serving(gateway, tmp_path / "admin.sock"):
        assert run(tmp_path / "admin.sock", "requests").stdout == "no requests\n"


def test_cancel_says_what_it_was_and_fails_for_one_that_is_not_there(gateway: Gateway, tmp_path: Path) -> None:
    with serving(gateway, tmp_path / "admin.sock"):
        result = run(tmp_path / "admin.sock", "cancel", "ab12cd-7", "a/b")
    assert result.stdout.splitlines() == [
        "ab12cd-7: cancelled; it was waiting, for demo/qwen-7b",
        "a/b: there is no request 'a/b' under way",
    ]
    assert result.returncode == 1
    assert [path for method, path, _ in gateway.asked if method == "DELETE"] == [
        "/api/v1/requests/ab12cd-7",
        "/api/v1/requests/a%2Fb",
    ]


def event(number: int) -> bytes:
    data = {"type": "model_changed", "time": 0.0, "message": f"a\x1b[31m is ready {number}"}
    return f"id: run-{number}\nevent: model_changed\ndata: {json.dumps(data)}\n\n".encode()


def test_events_are_lines_without_escape_sequences(gateway: Gateway, tmp_path: Path) -> None:
    gateway.events = [b": nothing new\n\n" + event(1) + event(2), event(3)]
    with serving(gateway, tmp_path / "admin.sock"):
        result = run(tmp_path / "admin.sock", "events", "-n", "2")
        as_json = run(tmp_path / "admin.sock", "events", "--json")
    assert [line.rpartition("  ")[2] for line in result.stdout.splitlines()] == ["a is ready 1", "a is ready 2"]
    assert json.loads(as_json.stdout)["type"] == "model_changed"
    assert [path for _, path, _ in gateway.asked] == ["/api/v1/events?lines=2", "/api/v1/events?"]


def test_events_are_followed_through_a_gateway_that_is_replaced(gateway: Gateway, tmp_path: Path) -> None:
    gateway.events = [event(1), event(2)]
    path = tmp_path / "admin.sock"
    with serving(gateway, path):
        process = subprocess.Popen([MMDCTL, "--socket", path, "events", "-f"], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().endswith("is ready 1\n")
            assert process.stdout.readline().endswith("is ready 2\n")
        finally:
            process.kill()
            process.communicate()
    asked = [(path, last) for _, path, last in gateway.asked][:2]
    assert asked == [("/api/v1/events?follow=true&lines=10", None), ("/api/v1/events?follow=true&lines=10", "run-1")]


def test_pin_is_an_operation_like_the_others(gateway: Gateway, tmp_path: Path) -> None:
    done = Progress("demo/llama-8b", ModelState.READY, "is pinned: it makes room for no other model", done=True)
    gateway.operations = {("demo/llama-8b", "pin"): [done]}
    with serving(gateway, tmp_path / "admin.sock"):
        result = run(tmp_path / "admin.sock", "pin", "llama")
    assert result.stdout == "demo/llama-8b: is pinned: it makes room for no other model\n"
