"""API keys at the gateway: who is let in by which request, what of it engines see, and how much of it a key may have at once.

Everything here runs with the gateway's one process, and with workers.
"""

import ast
import asyncio
import json
import logging
import pickle
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from inspect import getsource
from pathlib import Path

import anthropic
import openai
import pytest
import relay_gateway
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_gateway import Connection, Running, body_of, engine, gateway, ok_answer, run, until

from mmd.config import EngineKind, Gateway, Model
from mmd.gateway.relay import access
from mmd.gateway.relay.access import Access
from mmd.gateway.relay.head import RequestHead, RequestParser
from mmd.gateway.relay.kept import with_owner
from mmd.gateway.relay.visitor import Visitor
from mmd.gateway.server import Door
from mmd.keys import Key, KeyRing, KeyScope, Limit, digest, key_text
from mmd.policy.actions import Refusal, Refuse

SECRETS = {name: key_text(name.encode().ljust(32, b".")) for name in ("all", "narrow", "adapter", "slow", "single", "wrong")}

ALL = Key("all", digest(SECRETS["all"].encode()))
NARROW = Key("narrow", digest(SECRETS["narrow"].encode()), models=("other*",))
ADAPTER = Key("adapter", digest(SECRETS["adapter"].encode()), models=("adapter-of-m",))
SLOW = Key("slow", digest(SECRETS["slow"].encode()), rate=Limit(3, 60))
SINGLE = Key("single", digest(SECRETS["single"].encode()), concurrency=1)
RING = KeyRing((ALL, NARROW, ADAPTER, SLOW, SINGLE), 7)


@pytest.fixture(params=[0, 2], ids=["alone", "workers"], autouse=True)
def processes(request: pytest.FixtureRequest) -> Iterator[None]:
    relay_gateway.default_workers = request.param
    yield
    relay_gateway.default_workers = 0


class Recorder:
    """An engine that answers everything, when it is let go, and keeps what it was sent."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.go = asyncio.Event()
        self.go.set()
        self.serving = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(sum(lengths))
            self.heads.append(head)
            if b"websocket" in head:
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
                await reader.read()
                return
            self.serving += 1
            try:
                await self.go.wait()
            finally:
                self.serving -= 1
            answer = ok_answer(b'{"id": "resp_of_m", "choices": []}') if b"/v1/responses" in head else ok_answer()
            writer.write(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head.startswith(b"HEAD") else answer)
            await writer.drain()


@asynccontextmanager
async def guarded(path: Path, ring: KeyRing = RING, **options: object) -> AsyncIterator[tuple[Running, Recorder]]:
    """A gateway with the models m and other, each with an adapter, of one engine."""
    recorder = Recorder()
    async with (
        engine(path / "m.sock", recorder) as one,
        engine(path / "other.sock", recorder) as two,
        gateway({"m": one, "other": two}, keys=ring, **options) as running,  # type: ignore[arg-type]
    ):
        yield running, recorder


def asking(target: str, fields: bytes, body: bytes = b"", method: str = "POST") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body) if method == "POST" else b""
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n".encode() + fields + length + b"\r\n" + body


def bearer(name: str) -> bytes:
    return f"Authorization: Bearer {SECRETS[name]}\r\n".encode()


def x_api_key(name: str) -> bytes:
    return f"x-api-key: {SECRETS[name]}\r\n".encode()


def chat(fields: bytes, model: str = "m") -> bytes:
    return asking("/v1/chat/completions", fields, body_of(model))


_FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
_FORM_OF_NAME = _FORM.replace(b"\r\nm\r\n", b"\r\nNAME\r\n")
_KINDS = {
    "body": ("POST", "/v1/chat/completions", b"", body_of("m")),
    "kept": ("POST", "/v1/responses", b"", body_of("m")),
    "form": ("POST", "/v1/audio/transcriptions", b"Content-Type: multipart/form-data; boundary=b\r\n", _FORM),
    "query": ("GET", "/v1/realtime?model=m", b"", b""),
    "path": ("GET", "/upstream/m/v1/models", b"", b""),
    "id": ("GET", "/v1/responses/resp_of_m", b"", b""),
    "show": ("GET", "/v1/models/m", b"", b""),
}
_CREDENTIALS = {
    "none": (b"", 401),
    "empty": (b"Authorization: Bearer \r\n", 401),
    "other scheme": (b"Authorization: Basic YTpi\r\n", 401),
    "wrong, Bearer": (bearer("wrong"), 401),
    "wrong, x-api-key": (x_api_key("wrong"), 401),
    "Bearer": (bearer("all"), 200),
    "bearer": (bearer("all").replace(b"Bearer", b"bEARER"), 200),
    "x-api-key": (x_api_key("all"), 200),
    "both": (bearer("all") + x_api_key("all"), 200),
    "both, different": (bearer("all") + x_api_key("narrow"), 401),
    "a good one and a bad one": (bearer("all") + x_api_key("wrong"), 401),
    "hidden": (b"Connection: authorization\r\n" + bearer("all"), 401),
    "forbidden model": (bearer("narrow"), 404),
    "forbidden model, x-api-key": (x_api_key("narrow"), 404),
    "limited": (bearer("single"), 200),
}


def test_every_kind_of_route_by_every_kind_of_credential(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            client = await running.connect()
            assert (await client.ask(asking("/v1/responses", bearer("all"), body_of("m"))))[0] == 200
            await until(lambda: running.dispatcher.kept().find("resp_of_m"))
            for kind, (method, target, fields, body) in _KINDS.items():
                for name, (credentials, expected_of_most) in _CREDENTIALS.items():
                    recorder.heads.clear()
                    made_by_all = with_owner("m", running.inference.access.named("all").owner)  # type: ignore[union-attr]
                    running.dispatcher.kept().add("resp_of_m", made_by_all)
                    expected = 404 if (kind, name) == ("id", "limited") else expected_of_most
                    status, answer, content = await client.ask(asking(target, credentials + fields, body, method))
                    assert status == expected, (kind, name, content)
                    assert bool(recorder.heads) is (status == 200 and kind != "show"), (kind, name)
                    assert b"mmd-" not in content
                    if status >= 400:
                        code = "invalid_api_key" if status == 401 else "not_found" if kind == "id" else "model_not_found"
                        assert json.loads(content)["error"]["code"] == code, (kind, name)
                        assert ("www-authenticate" in answer) is (status == 401)
                    for head in recorder.heads:
                        assert b"mmd-" not in head, "a client's key went to the engine"
                        assert b"x-api-key" not in head.lower()

    with caplog.at_level(logging.DEBUG):
        run(scenario())
    assert not any(secret in caplog.text for secret in SECRETS.values())


def test_an_engine_never_sees_credentials_even_where_none_are_asked_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path, KeyRing()) as (running, recorder):
            client = await running.connect()
            for credentials in (b"", bearer("wrong"), x_api_key("wrong"), bearer("all") + x_api_key("wrong")):
                assert (await client.ask(chat(credentials)))[0] == 200
            assert len(recorder.heads) == 4
            assert not any(b"mmd-" in head for head in recorder.heads)

    run(scenario())


def test_a_websocket_of_a_browser_brings_its_key_as_a_subprotocol(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            for name, expected in (("all", 101), ("wrong", 401), ("narrow", 404)):
                client = await running.connect()
                protocols = f"realtime, openai-insecure-api-key.{SECRETS[name]}, openai-beta.realtime-v1"
                fields = f"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: {protocols}\r\n".encode()
                status, *_ = await client.ask(asking("/v1/realtime?model=m", fields, method="GET"))
                assert status == expected
            (head,) = recorder.heads
            assert b"Sec-WebSocket-Protocol: realtime, openai-beta.realtime-v1\r\n" in head
            assert b"mmd-" not in head

    run(scenario())


def test_what_needs_no_key_and_what_does(tmp_path: Path) -> None:
    async def scenario(door: Door, expected: dict[str, int]) -> None:
        async with guarded(tmp_path, door=door, workers=0) as (running, _):
            client = await running.connect()
            found = {target: (await client.ask(asking(target, b"", method="GET")))[0] for target in expected}
            assert found == expected

    api = {"/health": 200, "/v1/models": 401, "/v1/models/m": 401, "/upstream/m/health": 401, "/nothing": 401, "/v1/x": 401}
    run(scenario(Door.API, api))
    run(scenario(Door.ADMIN_TCP, {**api, "/nothing": 404}))
    run(scenario(Door.ADMIN_SOCKET, dict.fromkeys(api, 200) | {"/nothing": 404, "/v1/x": 404}))


def test_a_key_sees_the_models_that_it_is_good_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, _):
            client = await running.connect()

            async def get(target: str, name: str) -> tuple[int, str]:
                status, _, content = await client.ask(asking(target, bearer(name), method="GET"))
                return status, content.decode()

            listed = [each["id"] for each in json.loads((await get("/v1/models", "narrow"))[1])["data"]]
            assert listed == ["other", "adapter-of-other"]
            assert (await get("/v1/models/other", "narrow"))[0] == 200
            assert await get("/v1/models/m", "narrow") == await get("/v1/models/mm", "narrow")
            status, content = await get("/v1/models/mm", "narrow")
            assert (status, "'m'" in content) == (404, False), "a near name is none of this key's business"
            status, _, text = await client.ask(chat(bearer("narrow"), "mother"))
            assert (status, b"'other'" in text) == (404, False)
            status, _, text = await client.ask(chat(bearer("all"), "mother"))
            assert (status, b"'other'" in text) == (404, True)

    run(scenario())


def test_a_confined_key_cannot_tell_other_models_from_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            client = await running.connect()
            await client.ask(asking("/v1/responses", bearer("all"), body_of("m")))
            await until(lambda: running.dispatcher.kept().find("resp_of_m"))
            recorder.heads.clear()
            upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            asked = (
                ("POST", "/v1/chat/completions", b"", body_of("NAME")),
                ("POST", "/v1/chat/completions", b"X-MMD-Wait: 0\r\n", body_of("NAME", stream=True)),
                ("POST", "/v1/audio/transcriptions", b"Content-Type: multipart/form-data; boundary=b\r\n", _FORM_OF_NAME),
                ("GET", "/props?model=NAME", b"", b""),
                ("GET", "/v1/realtime?model=NAME", upgrade, b""),
                ("GET", "/v1/models/NAME", b"", b""),
                *(
                    (method, f"/upstream/NAME{path}", b"", b"")
                    for method in ("GET", "POST", "DELETE")
                    for path in ("", "/", "/sleep", "/v1/chat/completions", "/v1/models")
                ),
                ("GET", "/v1/responses/resp_NAME", b"", b""),
            )
            for method, target, fields, body in asked:
                for key in ("narrow", "adapter"):
                    answers = set()
                    for name in ("m", "alias-of-m", "nm") if key == "narrow" else ("other", "alias-of-other", "rethoo"):
                        request = asking(target, bearer(key) + fields, body, method).replace(b"resp_NAME", b"resp_of_NAME")
                        body_length = len(body) - len("NAME") + len(name) if b"NAME" in body else len(body)
                        request = request.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % body_length)
                        status, answer, content = await client.ask(request.replace(b"NAME", name.encode()))
                        del answer["date"]
                        for field in ("x-request-id", "content-length"):
                            answer.pop(field, None)
                        answers.add((status, str(answer), content.replace(b"resp_of_" + name.encode(), b"")))
                    assert len(answers) == 1, (method, target, key, answers)
                    assert next(iter(answers))[0] == 404, answers
            assert not recorder.heads

    run(scenario())


def test_a_key_for_an_adapter_is_none_for_its_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, _):
            client = await running.connect()
            found = {
                model: (await client.ask(chat(bearer("adapter"), model)))[0]
                for model in ("adapter-of-m", "m", "alias-of-m", "adapter-of-other")
            }
            assert found == {"adapter-of-m": 200, "m": 404, "alias-of-m": 404, "adapter-of-other": 404}
            for target in ("/upstream/adapter-of-m/v1/chat/completions", "/upstream/m/v1/chat/completions"):
                assert (await client.ask(asking(target, bearer("adapter"), body_of("m"))))[0] == 404
            assert (await client.ask(chat(bearer("narrow"), "alias-of-other")))[0] == 200

    run(scenario())


def test_each_request_of_a_connection_is_judged_by_its_own_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, _):
            client = await running.connect()
            names = ["all", "narrow", "all", "wrong", "single", "slow", "all", "adapter", "wrong", "single"] * 3
            await client.send(b"".join(chat(bearer(name)) for name in names))
            statuses = [(await client.answer())[0] for _ in names]
            expected = {"all": 200, "narrow": 404, "wrong": 401, "single": 200, "slow": 200, "adapter": 404}
            assert statuses == [expected[name] for name in names]

    run(scenario())


def test_a_body_is_not_taken_from_a_stranger(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            client = await running.connect()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 60000000\r\n\r\n"
            status, fields, _ = await client.ask(head)
            assert (status, fields["connection"]) == (401, "close")
            assert not recorder.heads

    run(scenario())


def test_other_keys_count_at_once_in_every_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            clients = [await running.connect() for _ in range(8)]

            async def statuses(name: str) -> Counter[int]:
                return Counter([(await client.ask(chat(bearer(name))))[0] for client in clients])

            ring = RING
            for _ in range(20):
                assert await statuses("all") == {200: 8}
                ring = ring.revoke("all")
                await running.use_keys(ring)
                assert await statuses("all") == {401: 8}
                ring = ring.add(ALL)
                await running.use_keys(ring)
            await running.use_keys(KeyRing((), 99))
            assert await statuses("narrow") == {401: 8}, "the last key was revoked: nobody has one"
            assert len(recorder.heads) == 160

    run(scenario())


def test_a_key_that_is_revoked_while_its_request_comes_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            for name in ("all", "single"):
                client = await running.connect()
                request = chat(bearer(name))
                await client.send(request[:-5])
                await asyncio.sleep(0.05)
                await running.use_keys(running.inference.access.ring.revoke(name))
                assert (await client.ask(request[-5:]))[0] == 401
            assert not recorder.heads

    run(scenario())


def test_a_key_of_the_same_name_is_another_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, _):
            client = await running.connect()
            assert (await client.ask(chat(bearer("all"))))[0] == 200
            await running.use_keys(KeyRing((Key("all", digest(SECRETS["wrong"].encode())),), 8))
            assert (await client.ask(chat(bearer("all"))))[0] == 401
            assert (await client.ask(chat(bearer("wrong"))))[0] == 200

    run(scenario())


def test_a_rate_is_exact_however_many_ask(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            clients = [await running.connect() for _ in range(20)]
            answers = await asyncio.gather(*(client.ask(chat(bearer("slow"))) for client in clients))
            assert Counter(status for status, *_ in answers) == {200: 3, 429: 17}
            assert len(recorder.heads) == 3
            for status, fields, content in answers:
                if status == 429:
                    assert fields["retry-after"] == "20"
                    assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"
            raised = KeyRing((Key("slow", SLOW.sha256, rate=Limit(4, 60)), ALL), 8)
            await running.use_keys(KeyRing((SLOW, ALL), 8))
            assert (await clients[0].ask(chat(bearer("slow"))))[0] == 429, "the same limit: what was counted is counted"
            await running.use_keys(raised)
            assert (await clients[0].ask(chat(bearer("slow"))))[0] == 200
            for request in (chat(bearer("slow"), "nothing"), asking("/v1/models", bearer("slow"), method="GET")):
                await running.use_keys(KeyRing((SLOW, ALL), running.inference.access.ring.serial + 1))
                assert (await clients[0].ask(request))[0] in (200, 404)
            found = Counter([(await client.ask(chat(bearer("slow"))))[0] for client in clients[:5]])
            assert found == {200: 3, 429: 2}, "what is no inference of a model costs nothing"

    run(scenario())


def test_retry_after_is_when_it_works_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        ring = KeyRing((Key("slow", SLOW.sha256, rate=Limit(1, 1)),), 1)
        async with guarded(tmp_path, ring) as (running, _):
            client = await running.connect()
            assert (await client.ask(chat(bearer("slow"))))[0] == 200
            begun = time.monotonic()
            status, fields, _ = await client.ask(chat(bearer("slow")))
            assert status == 429
            await asyncio.sleep(int(fields["retry-after"]) - (time.monotonic() - begun))
            assert (await client.ask(chat(bearer("slow"))))[0] == 200

    run(scenario())


def test_concurrency_is_given_back_however_a_request_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            visitor = running.inference.access.named("single")
            assert visitor is not None
            for end in ("answer", "leave", "engine gone", "error", "websocket"):
                recorder.go.clear()
                first, second = await running.connect(), await running.connect()
                if end == "websocket":
                    fields = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + bearer("single")
                    assert (await first.ask(asking("/v1/realtime?model=m", fields, method="GET")))[0] == 101
                else:
                    await first.send(chat(bearer("single"), "nothing" if end == "error" else "m"))
                    if end == "error":
                        assert (await first.answer())[0] == 404
                        assert visitor.in_flight == 0
                        continue
                    await until(lambda: recorder.serving == 1)
                status, fields_, content = await second.ask(chat(bearer("single")))
                assert (status, fields_["retry-after"], visitor.in_flight) == (429, "1", 1), (end, content)
                if end == "answer":
                    recorder.go.set()
                    assert (await first.answer())[0] == 200
                else:
                    await first.close()
                await until(lambda: visitor.in_flight == 0)
                recorder.go.set()
                await until(lambda: recorder.serving == 0)
                assert (await second.ask(chat(bearer("single"))))[0] == 200

    run(scenario())


def test_a_storm_of_keys_never_exceeds_what_they_may(tmp_path: Path) -> None:
    async def scenario() -> None:
        ring = KeyRing((ALL, Key("single", SINGLE.sha256, concurrency=3)), 1)
        async with guarded(tmp_path, ring) as (running, recorder):
            visitor = running.inference.access.named("single")
            assert visitor is not None
            most = 0

            async def ask(client: Connection, number: int) -> int:
                nonlocal most
                await asyncio.sleep(number % 7 / 500)
                status, *_ = await client.ask(chat(bearer("single" if number % 3 else "all")))
                most = max(most, visitor.in_flight)
                return status

            clients = [await running.connect() for _ in range(24)]
            found: Counter[int] = Counter()
            for turn in range(10):
                if turn % 2:  # nobody is answered until some have been turned away
                    recorder.go.clear()
                    asyncio.get_running_loop().call_later(0.05, recorder.go.set)
                found.update(await asyncio.gather(*(ask(client, turn + i) for i, client in enumerate(clients))))
            assert set(found) <= {200, 429}
            assert found[429]
            assert most <= 3
            assert visitor.in_flight == 0
            assert len(recorder.heads) == found[200]

    run(scenario())


def test_a_waiting_request_that_moves_on_is_not_counted_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path, ready=False) as (old, _), guarded_beside(tmp_path) as (new, recorder):
            visitor = new.inference.access.named("slow")
            assert visitor is not None
            for _ in range(3):
                assert visitor.enter(new.dispatcher.config.models["m"], "m", counted=False) is None
            client = await old.connect()
            pending: list[asyncio.Task[None]] = []

            def heir(connection: int, read: bytes, chunked: bool | None, let_in: bool) -> None:
                work = new.server.adopt(socket.socket(fileno=connection), read, chunked, let_in=let_in)
                pending.append(asyncio.ensure_future(work))

            # Of a model that never gets ready, it waits.
            old.lifecycle.start_s = 60
            await client.send(chat(bearer("slow")))
            await until(lambda: old.inference.access.named("slow").in_flight == 1)  # type: ignore[union-attr]
            old.server.hand_over(heir)
            assert (await client.answer())[0] == 200
            assert len(recorder.heads) == 1
            assert old.inference.access.named("slow").in_flight == 0  # type: ignore[union-attr]
            assert (await client.ask(chat(bearer("slow"))))[0] == 429, "the next one is counted"
            await asyncio.gather(*pending)

    run(scenario())


def test_a_waiting_stream_whose_key_is_revoked_meanwhile_ends_as_a_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            for request in (chat(bearer("wrong")), asking("/upstream/m/metrics", bearer("wrong"), method="GET")):
                ours, theirs = socket.socketpair()
                reader, writer = await asyncio.open_connection(sock=ours)
                adoption = asyncio.ensure_future(running.server.adopt(theirs, request, chunked=True, let_in=True))
                said = await reader.readuntil(b"[DONE]")
                assert b"invalid_api_key" in said
                assert await reader.readuntil(b"0\r\n\r\n") == b"\n\n\r\n0\r\n\r\n"
                writer.write(chat(bearer("all")))
                assert (await relay_gateway.read_answer(reader))[0] == 200, "and the connection goes on"
                writer.close()
                await adoption
            assert len(recorder.heads) == 2

    run(scenario())


def test_a_request_that_waits_is_refused_when_its_key_is_revoked(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path, ready=False) as (running, recorder):
            running.lifecycle.start_s = 60
            whole, stream, other = [await running.connect() for _ in range(3)]
            await whole.send(chat(bearer("all")))
            await stream.send(asking("/v1/chat/completions", x_api_key("all"), body_of("m", stream=True)))
            await other.send(chat(bearer("single")))
            await until(lambda: len(running.dispatcher.scheduler.state.waiting) == 3)
            await running.use_keys(KeyRing((SINGLE,), 8))
            async with asyncio.timeout(5):
                for each in (whole, stream):
                    status, _, content = await each.answer()
                    assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
                await until(lambda: len(running.dispatcher.scheduler.state.waiting) == 1)
            assert not recorder.heads

    run(scenario())


def test_what_began_without_a_key_ends_when_there_are_keys(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine(tmp_path / "m.sock", endless) as one, gateway({"m": one}, keys=KeyRing()) as running:
            stream, socket_ = [await running.connect() for _ in range(2)]
            await stream.send(asking("/v1/chat/completions", b"", body_of("m", stream=True)))
            await stream.reader.readuntil(b"data: 1\n\n")
            request = asking("/v1/realtime?model=m", b"Connection: Upgrade\r\nUpgrade: websocket\r\n", method="GET")
            assert (await socket_.ask(request))[0] == 101
            await running.use_keys(RING)
            async with asyncio.timeout(5):
                assert b"invalid_api_key" in await stream.reader.readuntil(b"[DONE]")
                assert await socket_.rest() == b""

    run(scenario())


_OF_OTHERS = (Refusal.QUEUE_FULL, Refusal.NEVER_FITS, Refusal.BACKING_OFF, Refusal.GPUS_UNREADABLE, Refusal.WAITED_TOO_LONG)


async def refused(running: Running, fields: bytes, model: str, refusal: Refusal, message: str) -> str:
    """What a waiting request for `model` is told that the scheduler refuses, with the last lines of an engine's log."""
    client = await running.connect()
    await client.send(chat(fields, model))
    await until(lambda: running.dispatcher.scheduler.state.waiting)
    (request,) = running.dispatcher._admissions
    running.dispatcher._perform(Refuse(request, refusal, message, tail=("a line of the log",)))
    running.dispatcher.scheduler.state.waiting.clear()
    running.dispatcher.scheduler.state.queues.clear()
    status, _, content = await client.answer()
    error = json.loads(content)["error"]
    assert (status // 100, error["code"]) == (5, refusal)
    said: str = error["message"]
    return said


def test_what_is_said_of_room_names_no_other_model_to_a_confined_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path, ready=False) as (running, _):
            running.lifecycle.start_s = 60
            message = "other waits: m is in the way"
            for refusal in _OF_OTHERS:
                assert await refused(running, bearer("slow" if refusal == _OF_OTHERS[0] else "all"), "other", refusal, message)
                said = await refused(running, bearer("narrow"), "other", refusal, message)
                assert " m " not in said, said
                assert "line of the log" not in said

    run(scenario())


def test_comments_tell_a_confined_key_nothing_of_other_models(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings_ = Gateway(loading_keepalive_s=0.05)
        async with guarded(tmp_path, ready=False, settings=settings_) as (running, _):
            running.lifecycle.start_s = 60
            for key, expected in (("narrow", b": the model is not ready yet\n"), ("all", b": other is ")):
                client = await running.connect()
                await client.send(asking("/v1/chat/completions", bearer(key), body_of("other", stream=True)))
                assert expected in await client.reader.readuntil(b"\n\n\r\n"), key

    run(scenario())


def test_a_key_for_an_adapter_does_not_learn_its_model_s_name_from_failures(tmp_path: Path) -> None:
    async def scenario() -> None:
        base = Model("base/weights", "base-weights", EngineKind.SIM, gpus=0, lora={"adapter-of-m": "/"})
        async with (
            engine(tmp_path / "m.sock", Recorder()) as one,
            gateway({"base-weights": one}, models=(base,), ready=False, keys=RING) as running,
        ):
            running.lifecycle.start_s = 60
            for refusal in (Refusal.START_FAILED, Refusal.STOPPED, *_OF_OTHERS):
                for message in ("base/weights: it exited with 1", "base-weights@cpu was stopped"):
                    said = await refused(running, bearer("adapter"), "adapter-of-m", refusal, message)
                    assert "base" not in said, said
            said = await refused(running, bearer("all"), "adapter-of-m", Refusal.START_FAILED, "base/weights: it exited")
            assert said == "base/weights: it exited"

    run(scenario())


def test_lines_of_engines_logs_are_for_administrators_where_there_are_keys_and_for_all_where_there_are_none(
    tmp_path: Path,
) -> None:
    boss = Key("boss", digest(SECRETS["wrong"].encode()), scope=KeyScope.ADMIN)

    async def scenario() -> None:
        async with guarded(tmp_path, KeyRing(), ready=False) as (running, _):
            running.lifecycle.start_s = 60
            arguments = ("m", Refusal.START_FAILED, "m: it exited")
            assert await refused(running, b"", *arguments) == "m: it exited\na line of the log"
            await running.use_keys(KeyRing((ALL, boss), 8))
            assert await refused(running, bearer("all"), *arguments) == "m: it exited"
            assert await refused(running, bearer("wrong"), *arguments) == "m: it exited\na line of the log"

    run(scenario())


@asynccontextmanager
async def guarded_beside(path: Path) -> AsyncIterator[tuple[Running, Recorder]]:
    beside = path / "beside"
    beside.mkdir()
    async with guarded(beside, workers=0) as found:
        yield found


def test_sdks_raise_what_they_should(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, _):
            url = f"http://127.0.0.1:{running.port}"

            async def ask(name: str) -> None:
                async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=SECRETS[name], max_retries=0) as client:
                    await client.chat.completions.create(model="m", messages=[])

            async def ask_as_anthropic(name: str) -> None:
                async with anthropic.AsyncAnthropic(base_url=url, api_key=SECRETS[name], max_retries=0) as client:
                    await client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}])

            for sdk, call in ((openai, ask), (anthropic, ask_as_anthropic)):
                with pytest.raises(sdk.AuthenticationError) as unknown:
                    await call("wrong")
                assert SECRETS["wrong"] not in str(unknown.value)
                with pytest.raises(sdk.NotFoundError, match="for the API key narrow"):
                    await call("narrow")
                await call("all")
                answered = [await asyncio.gather(call("slow"), return_exceptions=True) for _ in range(4)]
                assert isinstance(answered[-1][0], sdk.RateLimitError)

    run(scenario())


def test_a_known_head_is_looked_up_once_per_ring() -> None:
    access = Access()
    access.use(RING)
    parser = RequestParser()
    parser.parse(chat(bearer("all")).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    head: RequestHead = parser.head
    assert access.visitor(head) is access.named("all")
    head.fields = []  # it is not looked at again
    assert access.visitor(head) is access.named("all")
    other = Access()
    other.use(RING)
    assert other.visitor(head).key is None, "what one set of keys says, it says for itself"


def test_keys_are_compared_in_constant_time_and_are_no_dictionary_keys() -> None:
    tree = ast.parse(getsource(KeyRing.find).strip().join(("if True:\n    ", "")))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest" in calls
    assert not any(isinstance(node, ast.Compare) for node in ast.walk(tree))
    assert not any(isinstance(node, ast.Break | ast.Subscript) for node in ast.walk(tree))
    source = Path(access.__file__).with_name("access.py").read_text()
    assert source.count("ring.find(presented") == 1
    assert "dict[bytes" not in source


def test_what_earlier_gateways_still_answer_counts() -> None:
    access = Access()
    access.use(RING)
    visitor, model = access.named("single"), Model("m", "m", EngineKind.SIM)
    assert visitor is not None
    access.count_elsewhere("single", 1)
    access.count_elsewhere("gone", 1)
    assert visitor.enter(model, "m", counted=False) is not None
    access.use(KeyRing(RING.keys, 8))
    assert visitor.enter(model, "m", counted=False) is not None, "other keys change nothing about that"
    access.count_elsewhere("single", -1)
    access.count_elsewhere("single", -1)  # of a key that was another one before
    assert visitor.enter(model, "m", counted=False) is None
    assert visitor.enter(model, "m", counted=False) is not None


@given(st.lists(st.sampled_from(["enter", "leave", "renew", "tick"]), max_size=60), st.integers(1, 4))
@settings(max_examples=60)
def test_concurrency_is_never_exceeded_nor_lost(steps: list[str], most: int) -> None:
    key = Key("k", ALL.sha256, concurrency=most)
    access = Access()
    access.use(KeyRing((key,), 1))
    model = Model("m", "m", EngineKind.SIM)
    held: list[Visitor] = []
    for serial, step in enumerate(steps):
        visitor = access.named("k")
        assert visitor is not None
        if step == "enter":
            refused = visitor.enter(model, "m", counted=False)
            assert (refused is not None) is (len(held) >= most)
            if refused is None:
                held.append(visitor)
        elif step == "leave" and held:
            held.pop().leave()
        elif step == "renew":
            access.use(pickle.loads(pickle.dumps(KeyRing((key,), serial + 2))))
        assert visitor.in_flight == len(held)


def test_an_answer_that_an_engine_keeps_is_for_the_key_that_made_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with guarded(tmp_path) as (running, recorder):
            client = await running.connect()
            for made_at in ("/v1/responses", "/upstream/m/v1/responses"):
                assert (await client.ask(asking(made_at, bearer("all"), body_of("m"))))[0] == 200
                await until(lambda: running.dispatcher.kept().owner("resp_of_m"))
                recorder.heads.clear()
                going_on = b'{"model": "m", "previous_response_id": "resp_of_m"}'
                asked = (
                    ("GET", "/v1/responses/resp_of_m", b""),
                    ("DELETE", "/v1/responses/resp_of_m", b""),
                    ("GET", "/upstream/m/v1/responses/resp_of_m", b""),
                    ("POST", "/v1/responses", going_on),
                    ("POST", "/upstream/m/v1/responses", going_on),
                )
                for method, target, body in asked:
                    other = await client.ask(asking(target, bearer("slow"), body, method))
                    missing = await client.ask(
                        asking(target.replace("_of_m", "_of_x"), bearer("slow"), body.replace(b"_of_m", b"_of_x"), method)
                    )
                    assert (other[0], other[2]) == (missing[0], missing[2].replace(b"_of_x", b"_of_m")), target
                    assert other[0] == 404
                    assert not recorder.heads, "the engine was not asked"
                    assert (await client.ask(asking(target, bearer("all"), body, method)))[0] == 200, target
                    recorder.heads.clear()
            again = KeyRing((Key("all", digest(SECRETS["wrong"].encode())),), 9)
            await running.use_keys(again)
            assert (await client.ask(asking("/v1/responses/resp_of_m", bearer("wrong"), method="GET")))[0] == 404, (
                "of that name"
            )
            running.dispatcher.kept().add("resp_of_nobody", "m")
            boss = Key("boss", digest(SECRETS["narrow"].encode()), scope=KeyScope.ADMIN)
            await running.use_keys(KeyRing((*again.keys, boss), 10))
            for name, expected in (("wrong", 404), ("narrow", 200)):
                status, *_ = await client.ask(asking("/v1/responses/resp_of_nobody", bearer(name), method="GET"))
                assert status == expected, "what was made without a key is for administrators"

    run(scenario())


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An engine whose streams and WebSockets have no end."""
    head = await reader.readuntil(b"\r\n\r\n")
    if b"websocket" in head:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    else:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"9\r\ndata: 1\n\n\r\n")
    await writer.drain()
    await reader.read()


def test_a_revoked_key_s_streams_and_websockets_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        for change in ("revoked", "confined"):
            async with engine(tmp_path / "m.sock", endless) as one, gateway({"m": one}, keys=RING) as running:
                stream, socket_, other = [await running.connect() for _ in range(3)]
                await stream.send(asking("/v1/chat/completions", bearer("all"), body_of("m", stream=True)))
                await stream.reader.readuntil(b"data: 1\n\n")
                await other.send(asking("/v1/chat/completions", bearer("slow"), body_of("m", stream=True)))
                await other.reader.readuntil(b"data: 1\n\n")
                request = asking("/v1/realtime?model=m", upgrade + bearer("all"), method="GET")
                assert (await socket_.ask(request))[0] == 101
                keys = (SLOW,) if change == "revoked" else (SLOW, Key("all", ALL.sha256, models=("none*",)))
                begun = time.monotonic()
                await running.use_keys(KeyRing(keys, 8))
                async with asyncio.timeout(5):
                    said = await stream.reader.readuntil(b"[DONE]")
                    assert (b"invalid_api_key" if change == "revoked" else b"model_not_found") in said
                    assert await socket_.rest() == b""
                assert time.monotonic() - begun < 5
                assert running.inference.access.named("slow") is not None
                assert not other.reader.at_eof(), "that of another key goes on"

    run(scenario())
