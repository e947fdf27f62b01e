"""Models added, replaced and removed while others serve: by root, by a member of mmd-admin, over HTTP; in a real systemd."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from client import chat, post, stream
from testbed import PROCESSES, Installation, named

_MAIN = """
gateway: {workers: WORKERS, admin_auth: open}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
defaults: {engine: sim}
models:
  steady: {gpus: 0, sim: {load_time: 100ms, tokens_per_second: 20}}
  large: {vram: 20GiB, sim: {load_time: 100ms}}
"""
_SIM = ("--engine", "sim", "--set", "sim={load_time: 300ms, tokens_per_second: 500}")
_TCP = "http://127.0.0.1:8001"


@pytest.fixture(scope="module", params=PROCESSES, ids=named)
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.systemctl("stop", "mmd-gateway.service")
    installed.run("sh", "-c", "rm -f /var/lib/mmd/lessons.sqlite*")  # nothing is verified yet
    installed.configure(_MAIN.replace("WORKERS", str(request.param)))
    installed.run("useradd", "--groups", "mmd-admin,systemd-journal", f"operator{request.param}")
    installed.systemctl("start", "mmd-reload.path")
    yield installed
    installed.stop_all()
    clear(installed)


@pytest.fixture(autouse=True)
def nothing_added(machine: Installation) -> None:
    machine.ctl("stop", "--all", "--force")
    clear(machine)


def clear(machine: Installation) -> None:
    for file in machine.path("/etc/mmd/models.d").glob("*.yaml"):
        machine.ctl("remove", file.stem, "--force")


def operator(machine: Installation) -> str:
    return f"operator{1 if machine.status()['gateway']['workers'] == 1 else 2}"


def model(machine: Installation, name: str) -> dict[str, Any] | None:
    return next((each for each in machine.status()["models"] if each["name"] == name), None)


def present(machine: Installation) -> set[str]:
    """The models of the configuration in use."""
    return {each["name"] for each in machine.status()["models"] if each["revision"]}


def state(machine: Installation, name: str) -> str | None:
    found = model(machine, name)
    return found["state"] if found else None


def test_root_adds_a_model_that_is_tried_used_and_removed(machine: Installation) -> None:
    told = machine.ctl("add", "org/new", "--vram", "6GiB", "--alias", "fresh", *_SIM).stdout.splitlines()
    assert told[0] == "org/new: registered in /etc/mmd/models.d/org-new.yaml"
    assert told[-1].startswith("org/new: verified: ready in "), told
    assert told[-1].endswith(", 6.0 GiB")
    assert machine.run("stat", "-c", "%a %U", "/etc/mmd/models.d/org-new.yaml").stdout == "644 root\n"
    assert chat("fresh").json["model"] == "org/new"
    told = machine.ctl("remove", "fresh").stdout.splitlines()
    assert told[0] == "org/new: removed /etc/mmd/models.d/org-new.yaml"
    assert "nothing of it runs" in told[-1]
    assert machine.show("mmd-model-org-new@0.service", "ActiveState") == "inactive"
    assert chat("org/new").status == 404
    assert model(machine, "org/new") is None


def test_a_member_of_mmd_admin_has_the_gateway_do_it(machine: Installation) -> None:
    who = operator(machine)
    told = machine.run("mmdctl", "add", "theirs", "--gpus", "0", *_SIM, user=who).stdout
    assert "theirs: registered in /etc/mmd/models.d/theirs.yaml" in told
    assert "theirs: verified: ready in" in told
    assert machine.run("stat", "-c", "%a %U", "/etc/mmd/models.d/theirs.yaml").stdout == "644 root\n"
    refused = machine.run("mmdctl", "add", "theirs", "--gpus", "0", *_SIM, user=who, check=False)
    assert refused.returncode == 1
    assert "there is a model 'theirs' already" in refused.stderr
    wrong = machine.run("mmdctl", "add", "other", "--vram", "4", "--engine", "sim", user=who, check=False)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "--vram: models.other.vram: 4 is not a size" in wrong.stderr
    unknown = machine.run("mmdctl", "remove", "nobody", user=who, check=False)
    assert unknown.returncode == 4
    shared = machine.run("mmdctl", "remove", "steady", user=who, check=False)
    assert "steady is defined in /etc/mmd/mmd.yaml:7" in shared.stderr
    assert "nothing of it runs" in machine.run("mmdctl", "remove", "theirs", user=who).stdout
    mmd = machine.run("id", "-u", "mmd").stdout.strip()
    assert f"asked by uid {mmd}" in machine.journal("-t", "mmd-registrar")


def test_nobody_else_reaches_the_registrar(machine: Installation) -> None:
    assert machine.run("stat", "-c", "%a %U", "/run/mmd/registrar.sock").stdout == "600 mmd\n"
    connect = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/mmd/registrar.sock')"
    for user in (operator(machine), "mmd-fetch"):
        assert "PermissionError" in machine.run("python3", "-c", connect, user=user, check=False).stderr
    silent = f"{connect}; s.shutdown(1); print(s.recv(9))"
    assert machine.run("python3", "-c", silent, user="mmd").stdout == "b''\n"
    machine.systemctl("stop", "mmd-registrar.socket")
    down = machine.run("mmdctl", "add", "x", "--gpus", "0", *_SIM, user=operator(machine), check=False)
    machine.systemctl("start", "mmd-registrar.socket")
    assert "systemctl start mmd-registrar.socket" in down.stderr


def test_over_http_in_json(machine: Installation) -> None:
    settings = {"engine": "sim", "gpus": 0, "sim": {"load_time": "100ms"}}
    added = post("/api/v1/models", {"name": "a/b", **settings}, api=_TCP)
    assert added.status == 201, added.text
    (found,) = added.json["models"]
    assert (found["name"], found["id"], found["state"]) == ("a/b", "a-b", "pending")
    assert added.json["files"] == ["/etc/mmd/models.d/a-b.yaml"]
    assert chat("a/b").status == 200, "a request may come before any trial"
    several = {"models": {"c": settings, "a/b": {**settings, "description": "changed"}}}
    assert post("/api/v1/models", several, api=_TCP).status == 409
    replaced = post("/api/v1/models?replace=true", several, api=_TCP)
    assert [each["state"] for each in replaced.json["models"]] == ["pending", "ready"], "a description needs no new trial"
    wrong = post("/api/v1/models", {"name": "d", "engine": "sim", "vrma": "1GiB"}, api=_TCP)
    assert (wrong.status, wrong.error["param"], wrong.error["code"]) == (400, "models.d.vrma", "model_invalid")
    for body in (b"{", b"[]", b"{}", b'{"models": []}', b'{"name": 3}', b'{"name": "x", "models": {}}', b"[" * 99_999):
        assert post("/api/v1/models", body, api=_TCP).status == 400, body
    connection = http.client.HTTPConnection("127.0.0.1", 8001, timeout=30)
    answers = []
    for path in ("a%2Fb?force=true", "c", "c", "steady", "c?force=maybe"):
        connection.request("DELETE", f"/api/v1/models/{path}")
        answer = connection.getresponse()
        answers.append((answer.status, json.loads(answer.read())))
    connection.close()
    assert [status for status, _ in answers] == [200, 200, 404, 409, 400], answers
    assert answers[0][1]["leaving"] == [{"unit": "mmd-model-a-b@cpu.service", "in_flight": 0}]


def test_streams_of_other_models_go_on_whatever_happens(machine: Installation) -> None:
    heard: list[str] = []
    enough = threading.Event()

    def listen() -> None:
        for line in stream("steady", max_tokens=100_000, timeout_s=5, ignore_eos=True):
            heard.append(line)
            if enough.is_set():
                break

    listener = threading.Thread(target=listen)
    listener.start()
    machine.wait_until(lambda: len(heard) > 3)
    before = machine.show("mmd-model-steady@cpu.service", "InvocationID")
    machine.ctl("add", "x", "--gpus", "0", *_SIM)
    machine.ctl("add", "x", "--gpus", "0", "--replace", *_SIM, "--arg=--vram", "--arg=1")
    assert machine.ctl("add", "y", "--engine", "nonsense", check=False).returncode == 1
    assert machine.ctl("add", "steady-2", "--alias", "steady", "--gpus", "0", *_SIM, check=False).returncode == 1
    machine.ctl("remove", "x")
    assert listener.is_alive(), "nothing has ended it"
    enough.set()
    listener.join()
    assert not [line for line in heard if "error" in line]
    assert machine.show("mmd-model-steady@cpu.service", "InvocationID") == before


def test_requests_in_flight_are_finished_before_a_removed_model_stops(machine: Installation) -> None:
    machine.ctl("add", "slow", "--gpus", "0", "--engine", "sim", "--set", "sim={load_time: 100ms, tokens_per_second: 20}")
    lines = stream("slow", max_tokens=100, timeout_s=60, ignore_eos=True)
    next(lines)
    answers: list[str] = []
    remover = threading.Thread(target=lambda: answers.append(machine.ctl("remove", "slow").stdout))
    remover.start()
    machine.wait_until(lambda: chat("slow").status == 404)
    assert list(lines)[-2] == "data: [DONE]"
    remover.join()
    assert "slow: waiting for 1 request to finish" in answers[0]
    machine.ctl("add", "slow", "--gpus", "0", "--engine", "sim", "--set", "sim={load_time: 100ms, tokens_per_second: 20}")
    broken = stream("slow", max_tokens=2000, timeout_s=60, ignore_eos=True)
    next(broken)
    machine.ctl("remove", "slow", "--force")
    assert machine.show("mmd-model-slow@cpu.service", "ActiveState") == "inactive"
    assert "error" in "".join(list(broken)[-4:])


def test_a_model_that_does_not_work_is_failed_with_its_last_words_and_may_be_put_right(machine: Installation) -> None:
    failed = machine.ctl("add", "bad", "--vram", "2GiB", *_SIM, "--arg=--exit-during-load", "--arg=3", check=False)
    assert failed.returncode == 1
    assert "exited with status 3" in failed.stderr
    assert "  | " in failed.stderr, "its log"
    assert state(machine, "bad") == "failed"
    assert "ready in" in machine.ctl("add", "bad", "--replace", "--vram", "2GiB", *_SIM).stdout
    assert state(machine, "bad") == "ready"


def test_without_free_memory_a_model_stays_pending_until_there_is_some(machine: Installation) -> None:
    machine.ctl("start", "large")
    told = machine.ctl("add", "waits", "--vram", "6GiB", *_SIM).stdout
    assert "there is no free memory to try it in" in told
    assert (state(machine, "waits"), state(machine, "large")) == ("pending", "ready")
    machine.ctl("stop", "large")
    machine.wait_until(lambda: state(machine, "waits") == "ready", what="it is tried")
    machine.ctl("remove", "waits")
    machine.ctl("start", "large")
    assert "ready in" in machine.ctl("add", "waits", "--vram", "6GiB", "--start", *_SIM).stdout
    assert (state(machine, "waits"), state(machine, "large")) == ("ready", "sleeping"), "--start makes room"


def test_what_is_verified_is_remembered_and_belongs_to_a_definition(machine: Installation) -> None:
    machine.ctl("add", "kept", "--gpus", "0", *_SIM)
    machine.ctl("stop", "kept")
    assert state(machine, "kept") == "stopped"
    machine.systemctl("restart", "mmd-gateway.service")
    assert state(machine, "kept") == "stopped"
    machine.ctl("add", "kept", "--gpus", "0", *_SIM, "--replace", "--no-wait", "--priority", "5")
    machine.wait_until(lambda: state(machine, "kept") == "stopped", what="a priority is no new definition")
    machine.ctl("add", "kept", "--gpus", "0", *_SIM, "--replace", "--no-wait", "--ram", "1GiB")
    machine.wait_until(lambda: state(machine, "kept") == "pending", what="another definition")
    assert "verified: ready in" in machine.ctl("verify", "kept").stdout
    assert "is verified already" in machine.ctl("verify", "kept").stdout


def test_several_from_standard_input_and_as_json(machine: Installation) -> None:
    text = "models:\n  one: {gpus: 0, sim: {load_time: 100ms}}\n  two: {gpus: 0, sim: {load_time: 100ms}}\n"
    dry = machine.run("mmdctl", "add", "--from", "-", "--dry-run", "--json", input=text)
    assert list(json.loads(dry.stdout)) == ["/etc/mmd/models.d/one.yaml", "/etc/mmd/models.d/two.yaml"]
    assert model(machine, "one") is None
    done = machine.run("mmdctl", "add", "--from", "-", "--json", input=text)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["model"] for line in lines if line["done"] and line["ok"]} == {"one", "two"}
    assert state(machine, "one") == state(machine, "two") == "ready"
    again = machine.run("mmdctl", "add", "--from", "-", input=text.replace("one", "three"), check=False)
    assert again.returncode == 1
    assert model(machine, "three") is None, "all or none"


@pytest.mark.timeout(120)
def test_twenty_at_once_are_all_taken(machine: Installation) -> None:
    """Files that come while systemd reloads, or while a reload runs, are not lost, nor does anything give up watching."""
    names = [f"m{number}" for number in range(20)]
    command = "; ".join(f"mmdctl add {name} --engine sim --gpus 0 --no-wait" for name in names)
    machine.run("sh", "-c", command, timeout_s=60)
    machine.wait_until(lambda: present(machine) >= set(names), 30, "the gateway has them")
    loaded = partial(machine.show, "mmd-model-m19@cpu.service", "LoadState")
    machine.wait_until(lambda: loaded() == "loaded", 30, "and so has systemd, by the last reload")
    machine.run("sh", "-c", "rm /etc/mmd/models.d/m*.yaml")
    machine.wait_until(lambda: not present(machine) & set(names), 30, "and has them no more")
    assert machine.show("mmd-reload.path", "ActiveState") == "active"


@pytest.mark.timeout(120)
def test_many_who_add_at_once_over_the_api_all_succeed(machine: Installation) -> None:
    outcomes: list[int] = []

    def add(number: int) -> None:
        body = {"name": f"p{number}", "engine": "sim", "gpus": 0}
        outcomes.append(post("/api/v1/models", body, api=_TCP, timeout_s=90).status)

    with machine.network():
        threads = [threading.Thread(target=_in(machine, add), args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes == [201] * 6


def _in(machine: Installation, work: Any) -> Any:
    def run(number: int) -> None:
        with machine.network():
            work(number)

    return run


def test_without_the_watch_mmdctl_brings_it_into_use_itself(machine: Installation) -> None:
    machine.systemctl("stop", "mmd-reload.path", "mmd-reload-request.service", "mmd-reload.service")
    assert "verified: ready in" in machine.ctl("add", "x", "--gpus", "0", *_SIM).stdout
    assert "nothing of it runs" in machine.ctl("remove", "x").stdout
    machine.systemctl("start", "mmd-reload.path")


def test_a_gateway_that_is_stopped_finds_it_when_it_starts(machine: Installation) -> None:
    machine.systemctl("stop", "mmd-gateway.service")
    told = machine.ctl("add", "early", "--gpus", "0", *_SIM).stdout
    assert "early: verified: ready in" in told, "the socket starts it, and the unit is waited for"
    machine.systemctl("stop", "mmd-gateway.service", "mmd-admin.socket")
    assert machine.ctl("add", "later", "--gpus", "0", "--no-wait", *_SIM).returncode == 0
    down = machine.ctl("remove", "later", check=False)
    machine.systemctl("start", "mmd-admin.socket")
    assert down.returncode == 3
    assert "removed /etc/mmd/models.d/later.yaml" in down.stdout
    machine.wait_until(lambda: model(machine, "later") is None)


def test_an_addition_over_the_api_survives_its_client(machine: Installation) -> None:
    body = json.dumps({"name": "left", "engine": "sim", "gpus": 0}).encode()
    head = b"POST /api/v1/models HTTP/1.1\r\nHost: mmd\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.path("/run/mmd/admin.sock")))
        client.sendall(head + body)
        machine.wait_until(lambda: state(machine, "left") == "pending" or machine.path("/etc/mmd/models.d/left.yaml").exists())
    machine.wait_until(lambda: state(machine, "left") == "pending")
