"""Every route, through the gateway to the simulated engine, by clients that people have; with one process and with workers."""

import asyncio
import base64
import io
import json
import subprocess
import wave
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import anthropic
import openai
import pytest
from sim_gateway import SimGateway, serving

from mmd.gateway.relay.routing import ROUTES

SAID = "I am org/model, a simulated model. You said: hello there"
QUESTION: list[Any] = [{"role": "user", "content": "hello there"}]
NAMES = ["org/model", "short", "gpt-4o", "sql", "org/xml", "there"]
AT_ENGINE = {"sql": "sql", "org/xml": "org/xml"}


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "workers"])
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimGateway]:
    with serving(tmp_path_factory.mktemp("gateway"), workers=request.param) as found:
        yield found


@pytest.fixture(scope="module")
def client(gateway: SimGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def claude(gateway: SimGateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="-", max_retries=0) as found:
        yield found


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def curl(gateway: SimGateway, target: str, *words: str) -> Answer:
    """As curl sends it, paths and all."""
    command = ["curl", "-sS", "--path-as-is", "-m", "10", "-D", "/dev/stderr", *words, gateway.url + target]
    done = subprocess.run(command, capture_output=True, check=True)
    status, *lines = done.stderr.decode().replace("HTTP/1.1 100 Continue\r\n\r\n", "").splitlines()
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    return Answer(int(status.split()[1]), fields, done.stdout)


def post(gateway: SimGateway, target: str, **document: object) -> Answer:
    return curl(gateway, target, "-H", "Content-Type: application/json", "-d", json.dumps(document))


def wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return buffer.getvalue()


# The openai package.


@pytest.mark.parametrize("name", NAMES)
def test_chat_under_every_name(client: openai.OpenAI, name: str) -> None:
    at_engine = AT_ENGINE.get(name, "org/model")
    reply = client.chat.completions.create(model=name, messages=QUESTION)
    assert (reply.model, reply.choices[0].message.content) == (at_engine, SAID.replace("org/model", at_engine))
    pieces = list(client.chat.completions.create(model=name, messages=QUESTION, stream=True))
    assert {piece.model for piece in pieces} == {at_engine}
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == SAID.replace("org/model", at_engine)


def test_completions_and_embeddings(client: openai.OpenAI) -> None:
    assert client.completions.create(model="short", prompt="hello there").choices[0].text
    assert "".join(each.choices[0].text for each in client.completions.create(model="sql", prompt="a", stream=True))
    found = client.embeddings.create(model="short", input=["a", "b"])
    assert (len(found.data), found.model) == (2, "org/model")


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model="short", input="hello there")
    assert (made.model, made.output_text) == ("org/model", SAID)
    events = list(client.responses.create(model="sql", input="hello there", stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


def test_a_response_is_found_followed_cancelled_and_deleted_by_its_id(client: openai.OpenAI) -> None:
    for name in ("short", "sql", "filtered", "there"):
        made = client.responses.create(model=name, input="hello there", max_output_tokens=4)
        assert client.responses.retrieve(made.id).output_text == made.output_text
    streamed = next(iter(client.responses.create(model="filtered", input="hello there", stream=True)))
    assert streamed.type == "response.created"
    behind = client.responses.create(model="short", input="word " * 3000, background=True, max_output_tokens=3000)
    assert behind.status == "queued"
    first = next(iter(client.responses.retrieve(behind.id, stream=True)))
    assert first.type == "response.created"
    assert client.responses.cancel(behind.id).status == "cancelled"
    assert client.responses.retrieve(behind.id).status == "cancelled"
    client.responses.delete(behind.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(behind.id)
    follow_up = client.responses.create(model="short", input="a", previous_response_id=made.id if name == "short" else None)
    assert follow_up.status == "completed"


def test_a_response_that_nobody_keeps_is_not_found(client: openai.OpenAI) -> None:
    for ask in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="there is no response 'resp_none' here"):
            ask("resp_none")


def test_audio(client: openai.OpenAI) -> None:
    spoken = client.audio.speech.create(model="short", voice="alloy", input="four words are here")
    with wave.open(io.BytesIO(spoken.content)) as sound:
        assert sound.getnframes()
    for name in NAMES:
        heard = client.audio.transcriptions.create(model=name, file=("talk.wav", wav()))
        assert heard.text.startswith(
            f"I am {AT_ENGINE.get(name, 'org/model')}, a simulated model. You said: talk.wav, 16044 bytes, sha256 "
        )
    granular = client.audio.transcriptions.create(
        model="short", file=("talk.wav", wav()), response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert granular.segments
    events = list(client.audio.transcriptions.create(model="sql", file=("talk.wav", wav()), stream=True))
    assert events[-1].type == "transcript.text.done"


def test_translations(gateway: SimGateway, tmp_path: Path) -> None:
    """The openai package calls its own method for it deprecated."""
    (tmp_path / "talk.wav").write_bytes(wav())
    answer = curl(gateway, "/v1/audio/translations", "-F", f"file=@{tmp_path}/talk.wav", "-F", "model=sql")
    assert answer.json["text"].startswith("I am sql, a simulated model. You said: talk.wav")


def test_images(client: openai.OpenAI) -> None:
    made = client.images.generate(model="short", prompt="a red panda")
    assert made.data is not None
    picture = base64.b64decode(made.data[0].b64_json or "")
    assert picture.startswith(b"\x89PNG")
    edited = client.images.edit(model="short", prompt="a panda", image=[("a.png", picture), ("b.png", picture)])
    assert edited.data is not None
    assert base64.b64decode(edited.data[0].b64_json or "") != picture


def test_models(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["org/model", "sql", "org/xml", "filtered", "echo", "loud", "program", "there", "stopped"]
    assert all((model.object, model.owned_by) == ("model", "mmd") and model.created > 0 for model in listed.values())
    parents = {name: getattr(model, "parent", None) for name, model in listed.items()}
    assert {name: parent for name, parent in parents.items() if parent} == {
        "sql": "org/model",
        "org/xml": "org/model",
        "loud": "echo",
    }
    for name, found in (("org/model", "org/model"), ("short", "org/model"), ("org/xml", "org/xml"), ("sql", "sql")):
        assert client.models.retrieve(name).id == found
    with pytest.raises(openai.NotFoundError, match="did you mean 'org/model'"):
        client.models.retrieve("org/modle")


@pytest.mark.parametrize("path", ["org/xml", "org%2Fxml", "org%2fxml"])
def test_a_model_with_a_slash_in_its_name_is_found(gateway: SimGateway, path: str) -> None:
    assert curl(gateway, f"/v1/models/{path}").json["id"] == "org/xml"


# The anthropic package.


@pytest.mark.parametrize("name", NAMES)
def test_messages(claude: anthropic.Anthropic, name: str) -> None:
    at_engine = AT_ENGINE.get(name, "org/model")
    made = claude.messages.create(model=name, max_tokens=99, messages=QUESTION)
    assert made.model == at_engine
    with claude.messages.stream(model=name, max_tokens=99, messages=QUESTION) as stream:
        assert "".join(stream.text_stream) == SAID.replace("org/model", at_engine)
    assert claude.messages.count_tokens(model=name, messages=QUESTION).input_tokens > 0


def test_anthropics_clients_see_errors_as_they_know_them(gateway: SimGateway, claude: anthropic.Anthropic) -> None:
    calls: tuple[Callable[[str], object], ...] = (
        lambda name: claude.messages.create(model=name, max_tokens=9, messages=QUESTION),
        lambda name: claude.messages.create(model=name, max_tokens=9, messages=QUESTION, stream=True),
        lambda name: claude.messages.count_tokens(model=name, messages=QUESTION),
    )
    for call in calls:
        with pytest.raises(anthropic.NotFoundError, match="did you mean 'org/model'") as error:
            call("org/modle")
        assert isinstance(error.value.body, dict)
        assert error.value.body["type"] == "error"
        assert error.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError, match='set "model"'):
            call("")
    for target, words in (
        ("/v1/messages", ("-X", "PUT")),
        ("/upstream/short/v1/messages", ()),
        ("/upstream/none/v1/messages", ()),
    ):
        answer = curl(gateway, target, *words)
        assert (answer.status, answer.json["type"]) == (405 if "none" not in target else 404, "error")
    assert curl(gateway, "/v1/messages/batches").json == {
        "error": {
            "message": "there is no GET /v1/messages/batches",
            "type": "invalid_request_error",
            "param": None,
            "code": "not_found",
        }
    }


def test_messages_under_a_models_path(gateway: SimGateway) -> None:
    with anthropic.Anthropic(base_url=f"{gateway.url}/upstream/org/model", api_key="-", max_retries=0) as claude:
        made = claude.messages.create(model="claude-sonnet", max_tokens=99, messages=QUESTION)
        assert made.model == "org/model"
    with openai.OpenAI(base_url=f"{gateway.url}/upstream/short/v1", api_key="-", max_retries=0) as client:
        assert client.chat.completions.create(model="gpt-4", messages=QUESTION).model == "org/model"
        assert client.audio.transcriptions.create(model="whisper-1", file=("talk.wav", wav())).text.startswith("I am org/model")
        response = client.responses.create(model="sql", input="a")
        assert client.responses.retrieve(response.id).model == "sql"


# curl.


@pytest.mark.parametrize(
    ("path", "sent", "key"),
    [
        *((f"{path}rerank", {"query": "a", "documents": ["a", "b"]}, "results") for path in ("/", "/v1/", "/v2/")),
        *((f"{path}reranking", {"query": "a", "documents": ["a", "b"]}, "results") for path in ("/", "/v1/")),
        *((f"{path}score", {"text_1": "a", "text_2": "b"}, "data") for path in ("/", "/v1/")),
        ("/classify", {"input": ["a"]}, "data"),
        ("/pooling", {"input": ["a"]}, "data"),
        ("/tokenize", {"prompt": "a b"}, "tokens"),
        ("/detokenize", {"tokens": [1, 2]}, "prompt"),
        ("/completion", {"prompt": "a"}, "content"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "content"),
        ("/sdapi/v1/txt2img", {"prompt": "a", "steps": 1}, "images"),
        ("/sdapi/v1/img2img", {"prompt": "a", "steps": 1, "init_images": ["aaaa"]}, "images"),
        ("/v1/completions", {"prompt": "a"}, "choices"),
    ],
)
def test_documents(gateway: SimGateway, path: str, sent: dict[str, object], key: str) -> None:
    for name in ("org/model", "short", "org/xml"):
        answer = post(gateway, path, model=name, **sent)
        assert answer.status == 200, answer.content
        assert key in answer.json


@pytest.mark.parametrize("path", ["/props", "/v1/audio/voices"])
def test_queries(gateway: SimGateway, path: str) -> None:
    for name in ("org/model", "short", "org%2Fxml"):
        answer = curl(gateway, f"{path}?model={name}")
        assert answer.status == 200
        assert answer.json
    only_the_head = curl(gateway, f"{path}?model=murmur", "-I")
    assert only_the_head.status == 200
    assert int(only_the_head.fields["content-length"]) > 0


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_every_route_arrives_as_it_was_sent(gateway: SimGateway, path: bytes) -> None:
    """Those too that the simulated engine does not answer."""
    for method in sorted(each.decode() for each in ROUTES[path].methods - {b"HEAD"}):
        target = path.decode()
        if method == "GET":
            answer = curl(gateway, f"{target}?a=%2F&model=murmur")
            assert answer.json == {"method": "GET", "target": f"{target}?a=%2F&model=echo", "body": ""}
            continue
        by_form = curl(gateway, target, "-F", "model=murmur", "-F", 'file=@/dev/null;filename=a"b;type=x/y')
        by_body = post(gateway, f"{target}?a=b", model="murmur", stop=1.50)
        answer, other = (by_body, by_form) if by_body.status == 200 else (by_form, by_body)
        assert other.status == 400, "it takes either"
        assert answer.json["target"] == (f"{target}?a=b" if answer is by_body else target)
        if answer is by_form:
            assert "\r\n\r\necho\r\n" in answer.json["body"]
        else:
            set_fields = {"max_tokens": 3, "metadata": {"ü": ["é", None, {"a": 1}]}}
            assert json.loads(answer.json["body"].encode("latin-1")) == {"model": "echo", **set_fields}


def test_filters_reach_the_engine(gateway: SimGateway) -> None:
    answer = post(gateway, "/v1/completions", model="filtered", prompt="a b c d e f", max_tokens=50, stop="am").json
    assert answer["usage"]["completion_tokens"] == 3, "filters.set"
    assert answer["choices"][0]["finish_reason"] == "length", "filters.strip"


def test_a_large_form_arrives_byte_for_byte(gateway: SimGateway, tmp_path: Path) -> None:
    sound = tmp_path / "large.wav"
    sound.write_bytes(wav() + (b"\r\n--\r\n" + bytes(range(256))) * 30000)
    direct = [
        curl(gateway, "/v1/audio/transcriptions", "-F", f"file=@{sound}", "-F", f"model={name}")
        for name in ("org/model", "short")
    ]
    assert {answer.status for answer in direct} == {200}
    assert len({answer.content for answer in direct}) == 1, "it tells which bytes arrived"


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("POST", "/props", "GET, HEAD"),
        ("DELETE", "/v1/audio/voices", "GET, HEAD, POST"),
        ("PUT", "/v1/responses/resp_1", "DELETE, GET, HEAD, POST"),
        ("POST", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("GET", "/upstream/short/tokenize", "POST"),
        ("POST", "/upstream/short/health", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(gateway: SimGateway, method: str, target: str, allowed: str) -> None:
    answer = curl(gateway, target, "-X", method)
    assert (answer.status, ", ".join(sorted(answer.fields["allow"].replace(" ", "").split(",")))) == (405, allowed)
    assert answer.json["error"]["code"] == "method_not_allowed"


def test_openais_clients_see_errors_as_they_know_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'org/model'") as error:
        client.chat.completions.create(model="org/modle", messages=QUESTION, stream=True)
    assert (error.value.code, error.value.param, error.value.type) == ("model_not_found", "model", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="'sql'"):
        client.audio.transcriptions.create(model="sqll", file=("talk.wav", wav()))


# /upstream.


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_programs_are_reached_by_every_method_and_path(gateway: SimGateway, method: str) -> None:
    target = "//a/b.%2Ec/%2F;x?a=b&model=none#"[:-1]
    answer = curl(gateway, f"/upstream/program{target}", "-X", method, "-d", "\r\nbody")
    assert answer.json == {"method": method, "target": target, "body": "\r\nbody"}


def test_programs_answer_heads_and_chunked_requests(gateway: SimGateway) -> None:
    assert curl(gateway, "/upstream/program/a", "-I").status == 200
    sent = subprocess.run(
        ["curl", "-sS", "-T", "-", f"{gateway.url}/upstream/program/a"], input=b"x" * 100000, capture_output=True, check=True
    )
    assert json.loads(sent.stdout) == {"method": "PUT", "target": "/a", "body": "x" * 100000}


@pytest.mark.parametrize(
    ("to", "place"),
    [
        ("/login", "/upstream/program/login"),
        ("http://localhost/a?b", "/upstream/program/a?b"),
        ("http://elsewhere/a", "http://elsewhere/a"),
        ("b", "b"),
    ],
)
def test_a_program_moves_its_clients_within_its_path(gateway: SimGateway, to: str, place: str) -> None:
    for _ in range(2):  # the same head again
        answer = curl(gateway, f"/upstream/program/moved?to={to}")
        assert (answer.status, answer.fields["location"]) == (302, place)
    bare = curl(gateway, "/upstream/program?a")
    assert (bare.status, bare.fields["location"]) == (307, "/upstream/program/?a")


@pytest.mark.parametrize("start", ["/upstream/org/model", "/upstream/org%2Fmodel", "/upstream/short", "/upstream/sql", ""])
@pytest.mark.parametrize(
    "path", ["/sleep", "//sleep", "/./sleep", "/%73leep", "/sleep/", "/x/../sleep", "/sleep;x", "/v1/load_lora_adapter"]
)
def test_control_of_an_engine_is_not_for_clients(gateway: SimGateway, start: str, path: str) -> None:
    for words in (("-X", "POST"), ("-d", "{}"), ()):
        assert curl(gateway, f"{start}{path}?level=1&model=org/model", *words).status == 404
    absolute = curl(gateway, "/x", "--request-target", f"http://127.0.0.1{start}{path}", "-X", "POST")
    assert absolute.status == 404
    assert not gateway.engines["org"].is_sleeping


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models", "/metrics"])
def test_what_an_engine_tells_of_itself_may_be_read(gateway: SimGateway, path: str) -> None:
    assert curl(gateway, f"/upstream/short{path}").status in (200, 404)
    assert curl(gateway, "/upstream/short/v1/models").json["data"][0]["id"] == "org/model"


# WebSockets.


def websocket(gateway: SimGateway, target: str, talk: Callable[[aiohttp.ClientWebSocketResponse], Awaitable[None]]) -> None:
    async def connect() -> None:
        async with aiohttp.ClientSession(gateway.url) as session, session.ws_connect(target, protocols=["realtime"]) as socket:
            await talk(socket)

    asyncio.run(asyncio.wait_for(connect(), 20))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/v1/realtime?model=org/model", "org/model"),
        ("/v1/realtime?x=y&model=short", "org/model"),
        ("/v1/realtime?model=org%2Fxml", "org/xml"),
        ("/upstream/org/model/v1/realtime", "org/model"),
        ("/upstream/short/v1/realtime?model=sql", "sql"),
    ],
)
def test_realtime(gateway: SimGateway, target: str, name: str) -> None:
    async def talk(socket: aiohttp.ClientWebSocketResponse) -> None:
        created = await socket.receive_json(timeout=5)
        assert (created["type"], created["session"]["model"], socket.protocol) == ("session.created", name, "realtime")
        content = [{"type": "input_text", "text": "hello there"}]
        await socket.send_json(
            {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": content}}
        )
        await socket.send_json({"type": "response.create"})
        events = [created]
        while events[-1]["type"] != "response.done":
            events.append(await socket.receive_json(timeout=5))
        text = "".join(event["delta"] for event in events if event["type"] == "response.text.delta")
        assert text == SAID.replace("org/model", name)

    websocket(gateway, target, talk)


def test_a_programs_websocket(gateway: SimGateway) -> None:
    async def talk(socket: aiohttp.ClientWebSocketResponse) -> None:
        for size in (1, 200_000):
            await socket.send_str("x" * size)
            assert await socket.receive_str(timeout=5) == "x" * 2 * size

    websocket(gateway, "/upstream/program/any/path", talk)
    websocket(gateway, "/upstream/program", talk)


def test_a_websocket_without_its_model_is_refused(gateway: SimGateway) -> None:
    async def talk(_: aiohttp.ClientWebSocketResponse) -> None:
        raise AssertionError("it is open")

    for target, status in (("/v1/realtime?model=none", 404), ("/v1/realtime", 400), ("/upstream/short/sleep", 404)):
        with pytest.raises(aiohttp.WSServerHandshakeError) as error:
            websocket(gateway, target, talk)
        assert error.value.status == status
