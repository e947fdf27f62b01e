"""One request starts a model: the whole path through systemd, with simulated engines of which two do not fit together."""

import json
import socket
import time
from collections.abc import Iterator

import openai
import pytest
from client import chat, get, post, stream
from testbed import Installation

_MODELS = """
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
resources: {ram: 100GiB}  # whatever the machine has: two sleepers keep 29 GiB
gateway: {loading_keepalive: 200ms}
models:
  org/first:
    id: first
    engine: sim
    aliases: [gpt-4o-mini]
    vram: 14GiB
    description: The first
    sim: {load_time: 500ms, wake_time: 100ms, tokens_per_second: 400}
  second:
    engine: sim
    vram: 16GiB
    sim: {load_time: 500ms, wake_time: 100ms, tokens_per_second: 400}
  slow:
    engine: sim
    vram: 4GiB
    gpus: 0
    sim: {load_time: 100ms, tokens_per_second: 10}
"""


@pytest.fixture(scope="module")
def serving(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


def _states(serving: Installation) -> dict[str, str]:
    return {model["name"]: model["state"] for model in serving.status()["models"]}


def test_a_chat_request_starts_its_model_through_the_socket(serving: Installation) -> None:
    serving.systemctl("stop", "mmd-gateway.service")
    answer = chat("org/first")
    assert answer.status == 200, answer.text
    assert answer.json["model"] == "org/first"
    assert answer.json["choices"][0]["message"]["content"]
    assert serving.show("mmd-model-first@0.service", "ActiveState") == "active"


def test_every_endpoint_answers_an_openai_client(serving: Installation) -> None:
    client = openai.OpenAI(base_url=f"{serving.api}/v1", api_key="none", max_retries=0)
    assert {model.id for model in client.models.list()} == {"org/first", "second", "slow"}
    assert client.models.retrieve("org/first").owned_by == "mmd"
    reply = client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}])
    assert reply.model == "org/first", "an alias reaches the model under its own name"
    pieces = client.chat.completions.create(model="org/first", messages=[{"role": "user", "content": "hello"}], stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert client.completions.create(model="org/first", prompt="once", max_tokens=4).choices[0].text
    assert client.embeddings.create(model="org/first", input="word").data[0].embedding
    assert client.responses.create(model="org/first", input="hello").output_text
    client.close()


def test_a_second_model_makes_the_first_sleep_and_a_third_request_wakes_it(serving: Installation) -> None:
    assert chat("org/first").status == 200
    assert chat("second").status == 200
    assert _states(serving) == {"org/first": "sleeping", "second": "ready", "slow": "pending"}
    assert chat("org/first").status == 200
    assert _states(serving)["second"] == "sleeping"
    assert serving.show("mmd-model-second@0.service", "ActiveState") == "active", "asleep, not stopped"


def test_routing_is_per_request_not_per_connection(serving: Installation) -> None:
    with openai.OpenAI(base_url=f"{serving.api}/v1", api_key="none", max_retries=0) as client:
        for name in ("org/first", "second", "org/first"):
            reply = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}])
            assert reply.model == name


def test_a_waiting_stream_gets_comments_then_its_events(serving: Installation) -> None:
    serving.ctl("stop", "org/first")
    lines = list(stream("org/first"))
    assert lines[0].startswith(": org/first is "), lines[0]
    assert lines[-2] == "data: [DONE]"


def test_mmdctl_sleeps_and_wakes_and_says_what_it_took(serving: Installation) -> None:
    assert chat("org/first").status == 200
    for level in ("1", "2"):
        slept = serving.ctl("sleep", "org/first", "--level", level).stdout
        assert "slept in" in slept
        assert "freed 13." in slept, slept
        woken = serving.ctl("wake", "org/first").stdout
        assert "awake in" in woken
        assert "14.0 GiB" in woken
        first, second = chat("org/first").json, chat("org/first").json
        content = first["choices"][0]["message"]["content"]
        assert content == second["choices"][0]["message"]["content"], "weights were reloaded: no garbage after level 2"


def test_mmdctl_stops_starts_and_restarts(serving: Installation) -> None:
    assert "stopped in" in serving.ctl("stop", "org/first").stdout
    assert _states(serving)["org/first"] == "stopped"
    assert "ready in" in serving.ctl("start", "org/first").stdout
    before = serving.show("mmd-model-first@0.service", "InvocationID")
    assert "ready in" in serving.ctl("restart", "org/first").stdout
    assert serving.show("mmd-model-first@0.service", "InvocationID") != before


def test_an_operator_need_not_wait_for_a_start(serving: Installation) -> None:
    serving.ctl("stop", "second")
    told = json.loads(serving.ctl("start", "--no-wait", "--json", "second").stdout)
    assert not told["done"]
    assert told["state"] != "ready"
    serving.wait_until(lambda: _states(serving)["second"] == "ready", 10)


def test_a_restart_goes_on_when_its_operator_has_left(serving: Installation) -> None:
    assert chat("second").status == 200
    before = serving.show("mmd-model-second@0.service", "InvocationID")
    with socket.socket(socket.AF_UNIX) as operator:
        operator.settimeout(10)
        operator.connect(str(serving.path("/run/mmd/admin.sock")))
        operator.sendall(b"POST /api/v1/models/second/restart HTTP/1.1\r\nHost: mmd\r\nContent-Length: 0\r\n\r\n")
        heard = b""
        while b'"state"' not in heard:
            heard += operator.recv(4096)
        assert b'"done": false' in heard
    serving.wait_until(lambda: _states(serving)["second"] == "ready", 10)
    assert serving.show("mmd-model-second@0.service", "InvocationID") not in {"", before}


def test_a_unit_started_by_hand_is_taken_over(serving: Installation) -> None:
    serving.ctl("stop", "--all")
    serving.systemctl("start", "mmd-model-second@0.service")
    serving.wait_until(lambda: _states(serving)["second"] == "ready", 5)
    assert chat("org/first").status == 200
    assert _states(serving)["second"] == "sleeping", "and makes room like any other"


def test_a_new_gateway_knows_since_when_models_are_ready_or_asleep(serving: Installation) -> None:
    def since() -> dict[str, tuple[str, float]]:
        models = serving.status()["models"]
        return {each["unit"]: (each["state"], each["since"]) for model in models for each in model["instances"]}

    assert chat("slow").status == chat("org/first").status == 200
    serving.ctl("sleep", "org/first")
    before = since()
    time.sleep(1)
    serving.systemctl("restart", "mmd-gateway.service")
    after = since()
    assert {unit: state for unit, (state, _) in after.items()} == {unit: state for unit, (state, _) in before.items()}
    assert {state for state, _ in after.values()} == {"ready", "sleeping"}
    assert max(abs(after[unit][1] - before[unit][1]) for unit in before) < 0.5


def test_the_tools_people_have_see_everything(serving: Installation) -> None:
    assert chat("org/first").status == 200
    unit = serving.systemctl("cat", "mmd-model-first@0.service")
    assert "mmd-runner" in unit
    assert "mmd-sim" in unit
    assert "Application startup complete" in serving.journal("MMD_MODEL=first")
    assert "Started" in serving.ctl("logs", "org/first").stdout


def test_a_client_that_goes_away_ends_its_generation(serving: Installation) -> None:
    lines = stream("slow", max_tokens=2000)
    assert any(line.startswith("data: ") for line in lines)
    assert serving.status()["gateway"]["in_flight"] == 1
    lines.close()  # type: ignore[attr-defined]
    serving.wait_until(lambda: serving.status()["gateway"]["in_flight"] == 0, 5, "the request is over for the gateway")
    running = ["curl", "-s", "--unix-socket", "/run/mmd-model/slow@cpu/engine.sock", "http://localhost/metrics"]
    serving.wait_until(lambda: 'requests_running{model_name="slow"} 0' in serving.run(*running).stdout, 5, "and for the engine")


def test_other_programs_and_other_servers_are_served_as_well(serving: Installation) -> None:
    command = '[/usr/lib/mmd/bin/mmd-sim, --socket, "{socket}", --model, "{model}"]'
    program = f"{{engine: command, gpus: 0, listen: unix, command: {command}}}"
    elsewhere = "{engine: external, endpoint: 'http://127.0.0.1:8000', model: program}"
    serving.configure(f"{_MODELS}  program: {program}\n  elsewhere: {elsewhere}\n")
    assert chat("program").json["model"] == "program"
    assert chat("elsewhere").json["model"] == "program", "a server knows its model by a name of its own"
    assert _states(serving)["elsewhere"] == "external"
    refused = serving.ctl("stop", "elsewhere", check=False)
    assert refused.returncode == 1
    assert "mmd only routes to it" in refused.stderr
    serving.configure(_MODELS)


def test_operators_read_over_tcp_but_do_not_change(serving: Installation) -> None:
    assert get("/api/v1/status", api="http://127.0.0.1:8001").json["gateway"]["version"]
    assert get("/api/v1/status").status == 404, "not on the port that clients use"
    refusal = post("/api/v1/models/second/stop", {}, api="http://127.0.0.1:8001")
    assert refusal.status == 403
    assert "mmdctl" in refusal.error["message"]


def test_the_gateway_is_unprivileged_and_keeps_to_its_sandbox(serving: Installation) -> None:
    pid = serving.show("mmd-gateway.service", "MainPID")
    assert serving.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip() == "mmd"
    capabilities = serving.run("grep", "CapEff", f"/proc/{pid}/status").stdout.split()[1]
    assert int(capabilities, 16) == 0


def test_idle_models_sleep_then_stop(serving: Installation) -> None:
    serving.configure(_MODELS.replace("    id: first\n", "    id: first\n    idle: {sleep_after: 500ms, stop_after: 2s}\n"))
    assert chat("org/first").status == 200
    begun = time.monotonic()
    serving.wait_until(lambda: _states(serving)["org/first"] == "sleeping", 5)
    serving.wait_until(lambda: _states(serving)["org/first"] == "stopped", 8)
    assert time.monotonic() - begun > 1
    serving.configure(_MODELS)
