"""Routes through the installed gateway: real clients, adapters, programs, and answers that outlive upgrades and crashes.

Every test runs twice: with the gateway's one process, and with workers. tests/unit/test_route_clients.py has every route.
"""

import asyncio
import io
import json
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from client import get, post
from testbed import PROCESSES, Installation, named

_MODELS = """
gateway: {workers: WORKERS}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
policy: {min_residency: 0s}
models:
  org/first:
    id: first
    engine: sim
    aliases: [gpt-4o-mini]
    lora: {sql: /srv/sql, org/xml: /srv/xml}
    vram: 4GiB
    sim: {load_time: 200ms, tokens_per_second: 500}
  filtered:
    engine: sim
    filters: {strip: [stop], set: {max_tokens: 3}}
    vram: 4GiB
    sim: {load_time: 200ms, tokens_per_second: 500}
  slow:
    engine: sim
    vram: 4GiB
    sim: {load_time: 200ms, tokens_per_second: 1.5}
  program:
    engine: command
    gpus: 0
    command: [/usr/bin/python3, -m, http.server, --bind, 127.0.0.1, --directory, /usr/share, "{port}"]
    health: {path: /}
"""
_GATEWAY = "mmd-gateway.service"
_QUESTION: list[Any] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module", params=PROCESSES, ids=named)
def machine(installed: Installation, request: pytest.FixtureRequest) -> Iterator[Installation]:
    installed.configure(_MODELS.replace("WORKERS", str(request.param)))
    yield installed
    installed.stop_all()


@pytest.fixture
def client(machine: Installation) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{machine.api}/v1", api_key="none", max_retries=0) as found:
        yield found


def _state(machine: Installation, name: str) -> str:
    return {model["name"]: str(model["state"]) for model in machine.status()["models"]}[name]


def _upgrade(machine: Installation) -> None:
    before = machine.show(_GATEWAY, "MainPID")
    machine.systemctl("reload", _GATEWAY)
    machine.wait_until(lambda: machine.show(_GATEWAY, "MainPID") != before, 30, "another main process")
    machine.wait_until(lambda: machine.show(_GATEWAY, "ActiveState") == "active", 30)


@pytest.mark.parametrize("name", ["org/first", "gpt-4o-mini", "sql", "org/xml"])
def test_every_name_is_served(machine: Installation, client: openai.OpenAI, name: str) -> None:
    at_engine = name if name in {"sql", "org/xml"} else "org/first"
    said = f"I am {at_engine}, a simulated model. You said: hello there"
    assert client.chat.completions.create(model=name, messages=_QUESTION).choices[0].message.content == said
    assert client.responses.create(model=name, input="hello there").output_text == said
    sound = io.BytesIO()
    with wave.open(sound, "wb") as written:
        written.setparams((1, 2, 8000, 0, "NONE", ""))
        written.writeframes(bytes(16000))
    heard = client.audio.transcriptions.create(model=name, file=("talk.wav", sound.getvalue()))
    assert heard.text.startswith(f"I am {at_engine}, a simulated model. You said: talk.wav, 16044 bytes")
    with anthropic.Anthropic(base_url=machine.api, api_key="none", max_retries=0) as claude:
        with claude.messages.stream(model=name, max_tokens=99, messages=_QUESTION) as stream:
            assert "".join(stream.text_stream) == said
        with pytest.raises(anthropic.NotFoundError, match="did you mean"):
            claude.messages.create(model=f"{name}s", max_tokens=9, messages=_QUESTION)
    assert get(f"/props?model={name}").status == 200
    assert client.models.retrieve(name).id == at_engine


def test_filters_change_requests(machine: Installation) -> None:
    answer = post("/v1/completions", {"model": "filtered", "prompt": "a b c d e f", "max_tokens": 50, "stop": "am"}).json
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")


def test_a_program_is_reached_and_an_engines_control_is_not(machine: Installation) -> None:
    page = get("/upstream/program/")
    assert page.status == 200
    assert "Directory listing" in page.text
    moved = get("/upstream/program/doc?x")
    assert (moved.status, moved.headers["location"]) == (301, "/upstream/program/doc/?x")
    assert get("/upstream/program").headers["location"] == "/upstream/program/"
    for path in ("/sleep", "//sleep", "/%73leep", "/v1/../sleep"):
        assert post(f"/upstream/org/first{path}", {}).status == 404
    assert get("/upstream/org/first/v1/models").json["data"][0]["id"] == "org/first"


def test_a_websocket_to_a_model_that_is_not_loaded(machine: Installation) -> None:
    async def talk(target: str) -> str:
        async with aiohttp.ClientSession(machine.api) as session, session.ws_connect(target) as socket:
            created = await socket.receive_json(timeout=10)
            return str(created["session"]["model"])

    for target in ("/v1/realtime?model=gpt-4o-mini", "/upstream/org/first/v1/realtime"):
        machine.ctl("stop", "org/first")
        assert asyncio.run(talk(target)) == "org/first"


def test_answers_are_found_after_an_upgrade_and_those_that_were_under_way_as_well(
    machine: Installation, client: openai.OpenAI
) -> None:
    before = client.responses.create(model="org/first", input="hello there")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.responses.create, model="slow", input="hello there")
        machine.wait_until(lambda: machine.status()["gateway"]["in_flight"] == 1)
        _upgrade(machine)
        assert not asking.done(), "the gateway before this one answers it"
        under_way = asking.result(40)
    for each in (under_way, before):
        assert client.responses.retrieve(each.id).output_text == each.output_text
    _upgrade(machine)
    for each in (under_way, before):
        assert client.responses.retrieve(each.id).output_text == each.output_text


def test_answers_are_found_after_a_crash(machine: Installation, client: openai.OpenAI) -> None:
    made = client.responses.create(model="org/first", input="hello there")
    time.sleep(1.5)  # written once a second
    before = machine.show(_GATEWAY, "MainPID")
    machine.systemctl("kill", "--signal=KILL", _GATEWAY)
    machine.wait_until(lambda: machine.show(_GATEWAY, "MainPID") not in {before, "0"} or get("/health").status == 200, 20)
    found = get(f"/v1/responses/{made.id}")
    assert found.status == 200, found.text
    assert found.json["id"] == made.id


def test_a_stopped_model_is_not_started_for_an_answer_that_went_with_it(machine: Installation, client: openai.OpenAI) -> None:
    made = client.responses.create(model="org/first", input="hello there")
    machine.ctl("stop", "org/first")
    with pytest.raises(openai.NotFoundError, match="not any more"):
        client.responses.retrieve(made.id)
    assert _state(machine, "org/first") == "stopped"
    assert json.loads(get("/v1/models/sql").text)["parent"] == "org/first"
