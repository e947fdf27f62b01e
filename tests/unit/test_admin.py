"""The admin API in one process and with workers: what it shows, cancels and streams, and that its document is complete."""

import asyncio
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from admin_gateway import Administered, scope_in, with_admin
from relay_gateway import Script, chat_bytes, ok_answer, read_request, until

from mmd.gateway.admin.openapi import document
from mmd.keys import Key, KeyRing, KeyScope, digest, key_text
from mmd.policy.actions import Sleep, Stop
from mmd.policy.events import Observed, Phase
from mmd.scope import ScopeKind

MODEL = "/api/v1/models/demo%2Fllama%208b"


def test_every_route_of_the_application_is_in_the_document_and_the_reverse(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        application = admin.running.server._runner.app
        routed = {
            (
                route.method,
                re.sub(r"{(\w+):\.\+}", r"{\1}", route.resource.get_info().get("formatter", route.resource.canonical)),
            )
            for route in application.router.routes()
            if route.resource is not None and route.resource.canonical.startswith("/api/")
        }
        found = await admin.get("/api/v1/openapi.json")
        described = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
        assert described == routed - {("HEAD", path) for _, path in routed}
        assert found == json.loads(json.dumps(document(admin.api.routes)))
        assert len(described) > 20

    with_admin(tmp_path, Script(), check)


def test_the_document_refers_to_what_there_is(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        text = json.dumps(await admin.get("/api/v1/openapi.json"))
        found = json.loads(text)
        assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) == set(found["components"]["schemas"])
        identifiers = [each["operationId"] for methods in found["paths"].values() for each in methods.values()]
        assert len(identifiers) == len(set(identifiers))

    with_admin(tmp_path, Script(), check)


def test_the_document_says_where_a_key_may_be_asked_for(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        found = await admin.get("/api/v1/openapi.json")
        for path, methods in found["paths"].items():
            for method, each in methods.items():
                assert {"401", "403"} <= each["responses"].keys(), (method, path)

    with_admin(tmp_path, Script(), check)


def test_models_are_shown_as_in_status(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        status = await admin.get("/api/v1/status")
        listed = await admin.get("/api/v1/models")
        assert [each["name"] for each in listed["models"]] == ["m", "demo/llama 8b"]
        assert [each.keys() for each in listed["models"]] == [each.keys() for each in status["models"]]
        for name in ("demo%2Fllama%208b", "demo/llama%208b", "alias-of-demo%2Fllama%208b"):
            assert (await admin.get(f"/api/v1/models/{name}"))["name"] == "demo/llama 8b"
        assert await admin.get("/api/v1/gpus") == {"gpus": [], "problem": ""}

    with_admin(tmp_path, Script(), check)


@pytest.mark.parametrize(
    ("method", "path", "body", "media", "status", "code"),
    [
        ("GET", "/api/v1/models/none", "", "", 404, "model_not_found"),
        ("GET", "/api/v1/none", "", "", 404, "not_found"),
        ("PUT", "/api/v1/models", "", "", 405, "method_not_allowed"),
        ("POST", f"{MODEL}/fly", "", "", 405, "method_not_allowed"),
        ("GET", "/api/v1/models?x=1", "", "", 400, "unknown_parameter"),
        ("GET", "/api/v1/events?follow=maybe", "", "", 400, "bad_parameter"),
        ("GET", "/api/v1/events?lines=1&lines=2", "", "", 400, "bad_parameter"),
        ("GET", "/api/v1/events?lines=-1", "", "", 400, "bad_parameter"),
        ("GET", "/api/v1/logs?lines=10001", "", "", 400, "bad_parameter"),
        ("GET", "/api/v1/logs?model=none", "", "", 404, "model_not_found"),
        ("POST", f"{MODEL}/stop", "{", "application/json", 400, "invalid_json"),
        ("POST", f"{MODEL}/stop", "[" * 100_000, "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/stop", '{"force": "\udcff"}', "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/stop", "null", "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/stop", '{"force": 1}', "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/start", '{"force": true}', "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/sleep", '{"level": 3}', "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/sleep", '{"level": true}', "application/json", 400, "bad_option"),
        ("POST", f"{MODEL}/stop", "force=1", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("POST", f"{MODEL}/stop", "x" * (2 << 20), "application/json", 413, "bad_request"),
        ("POST", "/api/v1/config/check", "x", "image/png", 415, "unsupported_media_type"),
        ("DELETE", "/api/v1/requests/none-1", "", "", 404, "no_such_request"),
    ],
)
def test_what_is_wrong_is_said_in_the_shape_of_errors(
    tmp_path: Path, method: str, path: str, body: str, media: str, status: int, code: str
) -> None:
    async def check(admin: Administered) -> None:
        headers = {"Content-Type": media} if media else {}
        data = body.encode("utf-8", "surrogateescape")
        async with admin.http.request(method, path, data=io.BytesIO(data) if data else None, headers=headers) as answer:
            assert answer.status == status, await answer.text()
            error = (await answer.json())["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == code
            if status == 405:
                assert answer.headers["Allow"] == ("GET,HEAD,POST" if path == "/api/v1/models" else "DELETE,GET,HEAD")

    with_admin(tmp_path, Script(), check)


def test_operations_say_how_they_went(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        assert (await admin.operate(f"{MODEL}/start"))["message"] == "is ready already"
        await admin.operate(f"{MODEL}/sleep", level=1)
        assert Sleep in map(type, admin.running.lifecycle.actions)
        assert (await admin.operate(f"{MODEL}/stop", force=False))["state"] == "stopped"
        assert Stop in map(type, admin.running.lifecycle.actions)
        assert (await admin.operate(f"{MODEL}/restart"))["state"] == "ready"
        assert (await admin.operate(f"{MODEL}/reset"))["ok"]

    with_admin(tmp_path, Script(), check)


def test_a_pin_is_shown_and_kept(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        assert not (await admin.get(MODEL))["pinned"]
        assert (await admin.operate(f"{MODEL}/pin"))["ok"]
        assert (await admin.get(MODEL))["pinned"]
        assert json.loads((tmp_path / "pins.json").read_text()) == {"demo/llama 8b": True}
        await admin.operate(f"{MODEL}/unpin")
        assert not (await admin.get(MODEL))["pinned"]
        assert json.loads((tmp_path / "pins.json").read_text()) == {"demo/llama 8b": False}

    with_admin(tmp_path, Script(), check)


def _slow(head: bytes = b"", *pieces: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """An engine that takes a request, sends so much, and waits for its client to go."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces))
        assert await reader.read() == b""

    return serve


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}\n\n'


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_is_listed_and_cancelled_before_its_answer(tmp_path: Path, workers: int) -> None:
    async def check(admin: Administered) -> None:
        client = await admin.running.connect()
        await client.send(chat_bytes(more=b"X-Request-Id: mine.7\r\n"))
        found: list[dict[str, Any]] = []
        while not found or found[0]["state"] != "sent":
            found = (await admin.get("/api/v1/requests"))["requests"]
        (request,) = found
        assert request["client_id"] == "mine.7"
        assert (request["model"], request["method"], request["path"]) == ("m", "POST", "/v1/chat/completions")
        assert request["client"] == "{}:{}".format(*client.writer.get_extra_info("sockname"))
        assert not request["stream"]
        async with admin.http.delete(f"/api/v1/requests/{request['id']}") as answer:
            assert answer.status == 200
            assert (await answer.json())["id"] == request["id"]
        status, fields, content = await client.answer()
        assert (status, json.loads(content)["error"]["code"]) == (503, "cancelled_by_operator")
        assert (fields["x-request-id"], fields["x-should-retry"]) == ("mine.7", "false")
        await _nothing_left(admin)

    with_admin(tmp_path, _slow(), check, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_cancelled_with_a_proper_end(tmp_path: Path, workers: int) -> None:
    async def check(admin: Administered) -> None:
        client = await admin.running.connect()
        await client.send(chat_bytes(stream=True))
        found: list[dict[str, Any]] = []
        while not found or found[0]["sent_bytes"] == 0:
            found = (await admin.get("/api/v1/requests"))["requests"]
        (request,) = found
        assert (request["state"], request["stream"], request["tokens"]) == ("answering", True, 7)
        async with admin.http.delete(f"/api/v1/requests/{request['id']}") as answer:
            assert answer.status == 200
        status, fields, content = await client.answer()
        assert status == 200
        assert fields["x-request-id"] == request["id"]
        assert content.startswith(USAGE)
        events = content.removeprefix(USAGE).decode().split("\n\n")
        assert json.loads(events[0].removeprefix("data: "))["error"]["code"] == "cancelled_by_operator"
        assert events[1:] == ["data: [DONE]", ""]
        await _nothing_left(admin)

    with_admin(tmp_path, _slow(STREAM, USAGE), check, workers=workers)


async def _nothing_left(admin: Administered) -> None:
    await until(lambda: admin.running.in_flight == 0)
    assert await admin.get("/api/v1/requests") == {"requests": []}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_that_waits_is_in_the_queue_and_can_be_cancelled(tmp_path: Path, workers: int) -> None:
    async def check(admin: Administered) -> None:
        admin.running.lifecycle.start_s = 30
        first, second = await admin.running.connect(), await admin.running.connect()
        await first.send(chat_bytes())
        await until(lambda: admin.running.dispatcher.scheduler.state.waiting)
        await second.send(chat_bytes())
        await until(lambda: len(admin.running.dispatcher.scheduler.state.waiting) == 2)
        queue = (await admin.get("/api/v1/queue"))["queue"]
        assert [(each["model"], each["position"], each["waits_for"]) for each in queue] == [
            ("m", 1, "starting"),
            ("m", 2, "starting"),
        ]
        found = (await admin.get("/api/v1/requests"))["requests"]
        assert [each["state"] for each in found] == ["waiting", "waiting"]
        for each in found:
            async with admin.http.delete(f"/api/v1/requests/{each['id']}") as answer:
                assert answer.status == 200
        for client in (first, second):
            status, _, content = await client.answer()
            assert (status, json.loads(content)["error"]["code"]) == (503, "cancelled_by_operator")
        await _nothing_left(admin)
        assert await admin.get("/api/v1/queue") == {"queue": []}

    with_admin(tmp_path, Script(), check, workers=workers, ready=False)


def test_ids_go_to_engines_and_clients(tmp_path: Path) -> None:
    script = Script(ok_answer(more=b"X-Request-Id: the-engines\r\n"))

    async def check(admin: Administered) -> None:
        client = await admin.running.connect()
        ids = []
        for more in (b"", b"X-Request-Id: a b\r\n", b"x-request-id: abc-1\r\n"):
            status, fields, _ = await client.ask(chat_bytes(more=more))
            assert status == 200
            ids.append(fields["x-request-id"])
        unknown = await client.ask(chat_bytes("none"))
        assert (unknown[0], unknown[1]["x-request-id"]) == (404, f"{ids[0].partition('-')[0]}-4")
        prefix = ids[0].removesuffix("-1")
        assert re.fullmatch(r"[0-9a-f]{6}", prefix)
        assert ids == [f"{prefix}-1", f"{prefix}-2", "abc-1"]
        heads = [head.decode().lower() for head, _ in script.requests]
        assert [re.findall(r"x-request-id: (.*)\r", head) for head in heads] == [[each] for each in ids]

    with_admin(tmp_path, script, check)


def test_events_tell_what_is_done_and_why(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        await admin.operate(f"{MODEL}/stop")
        await admin.operate(f"{MODEL}/start")
        events = await admin.events("/api/v1/events")
        told = [(each["event"], each["data"].get("action"), each["data"].get("why")) for each in events]
        begun = [each for each in told if each[0] == "action_begun"]
        asked = "asked for by an operator"
        assert begun == [("action_begun", "stop", asked), ("action_begun", "start", asked)]
        ended = [each["data"] for each in events if each["event"] == "action_ended"]
        assert [(each["action"], each["ok"]) for each in ended] == [("stop", True), ("start", True)]
        states = [each["data"]["state"] for each in events if each["event"] == "model_changed"]
        assert states == ["stopping", "stopped", "starting", "ready"]
        numbers = [int(each["id"].rpartition("-")[2]) for each in events]
        assert numbers == sorted(set(numbers))
        last = events[-3]["id"]
        assert await admin.events("/api/v1/events", **{"Last-Event-ID": last}) == events[-2:]
        assert await admin.events("/api/v1/events?lines=2") == events[-2:]
        again = await admin.events("/api/v1/events", **{"Last-Event-ID": "another-7"})
        assert again[0]["event"] == "missed"
        assert again[1:] == events

    with_admin(tmp_path, Script(), check)


def test_events_tell_of_a_trial(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        await admin.operate(f"{MODEL}/stop")
        await admin.operate(f"{MODEL}/reset")
        assert (await admin.get(MODEL))["state"] == "pending", "what was learned of it is forgotten"
        assert "verified: ready in" in (await admin.operate(f"{MODEL}/verify"))["message"]
        begun = [each["data"] for each in await admin.events("/api/v1/events") if each["event"] == "action_begun"]
        assert (begun[-1]["action"], begun[-1]["why"]) == ("start", "it is tried")

    with_admin(tmp_path, Script(), check)


def test_events_are_followed_until_the_gateway_leaves(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        async with admin.http.get("/api/v1/events?follow=true&lines=0") as answer:
            assert answer.status == 200
            await admin.operate(f"{MODEL}/pin")
            unit = next(iter(admin.running.dispatcher.scheduler.state.instances))
            admin.running.dispatcher.post(Observed(unit, Phase.FAILED, reason="it exited"))
            while True:
                line = (await answer.content.readline()).decode()
                if line.startswith("data: "):
                    break
            assert json.loads(line.removeprefix("data: "))["state"] == "failed"
            admin.api.end_streams()
            await answer.content.read()  # a proper end of a chunked answer, or this raises

    with_admin(tmp_path, Script(), check)


def test_streams_are_for_get_only(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        for path in ("events", "logs"):
            async with admin.http.head(f"/api/v1/{path}?follow=true") as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, "GET")
        async with admin.http.head("/api/v1/status") as answer:
            assert answer.status == 200
        await until(lambda: not admin.running.handlers)

    with_admin(tmp_path, Script(), check)


def test_a_client_that_does_not_keep_up_is_sent_away(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        log = admin.running.dispatcher.narrator.log
        with log.listening() as listener:
            unit = next(iter(admin.running.dispatcher.scheduler.state.instances))
            for phase in (Phase.FAILED, Phase.READY) * 200:
                admin.running.dispatcher.post(Observed(unit, phase))
            assert listener.behind
            assert listener.queue.qsize() == 257
        assert len(await admin.events("/api/v1/events")) >= 400

    with_admin(tmp_path, Script(), check)


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journalctl that prints the file `journal`, and notes its arguments; nothing comes when it is to follow."""
    program = tmp_path / "journalctl"
    program.write_text(
        '#!/bin/sh\ncd "${0%/*}"\ncase $* in *--follow*) exec sleep 30 ;; esac\nprintf "%s\\n" "$@" >arguments\ncat journal\n'
    )
    program.chmod(0o755)
    lines = [
        {
            "__CURSOR": f"s=a;i={n}",
            "__REALTIME_TIMESTAMP": "1000000",
            "MESSAGE": f"line {n}",
            "PRIORITY": "6",
            "_UID": str(os.getuid()),
            "_SYSTEMD_USER_UNIT": "mmd-model-m@0.service",
        }
        for n in (1, 2)
    ]
    (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_logs_of_a_model_and_of_all(tmp_path: Path, journalctl: Path) -> None:
    async def check(admin: Administered) -> None:
        events = await admin.events("/api/v1/logs?model=alias-of-m&lines=5")
        assert [each["id"] for each in events] == ["s=a;i=1", "s=a;i=2"]
        assert events[0]["data"] == {
            "time": 1.0,
            "message": "line 1",
            "priority": 6,
            "model": "m",
            "unit": "mmd-model-m@0.service",
            "identifier": "",
            "pid": 0,
        }
        words = (journalctl / "arguments").read_text().split()
        assert words[-3:] == ["--lines=5", "--user-unit=mmd-model-m@*.service", "--user-unit=mmd-fetch-m.service"]
        await admin.events("/api/v1/logs", **{"Last-Event-ID": "s=a;i=2"})
        words = (journalctl / "arguments").read_text().split()
        assert words[-2:] == ["--after-cursor=s=a;i=2", "--user-unit=mmd-*"]
        async with admin.http.get("/api/v1/logs", headers={"Last-Event-ID": "--file=/etc/shadow"}) as answer:
            assert answer.status == 400

    with_admin(tmp_path, Script(), check, scope=scope_in(tmp_path)._replace(kind=ScopeKind.USER))


def test_streams_end_when_their_key_is_revoked(tmp_path: Path, journalctl: Path) -> None:
    secrets = {name: key_text(name.encode().ljust(32, b".")) for name in ("gone", "stays")}
    gone, stays = (Key(name, digest(secret.encode()), scope=KeyScope.ADMIN) for name, secret in secrets.items())

    async def check(admin: Administered) -> None:
        def follow(path: str, key: str) -> Any:
            return admin.http.get(f"/api/v1/{path}?follow=true", headers={"x-api-key": secrets[key]})

        for path in ("events", "logs"):
            await admin.running.use_keys(KeyRing((gone, stays), 1))
            async with follow(path, "gone") as ends, follow(path, "stays") as goes_on:
                assert (ends.status, goes_on.status) == (200, 200)
                await admin.running.use_keys(KeyRing((stays,), 2))
                async with asyncio.timeout(5):
                    with pytest.raises(aiohttp.ClientPayloadError):  # there is no proper end that says why
                        await ends.content.read()
                await until(lambda: len(admin.running.handlers) == 1)
                assert not goes_on.content.at_eof()
            async with follow(path, "gone") as refused:
                assert refused.status == 401
            await until(lambda: not admin.running.handlers)

    scope = scope_in(tmp_path)._replace(kind=ScopeKind.USER)
    with_admin(tmp_path, Script(), check, scope=scope, keys=KeyRing((gone, stays), 1))


def test_logs_that_are_followed_end_with_the_gateway_and_with_their_client(tmp_path: Path, journalctl: Path) -> None:
    async def check(admin: Administered) -> None:
        for leave in (False, True):
            async with admin.http.get("/api/v1/logs?follow=true") as answer:
                assert (await answer.content.readline()).startswith(b"id: s=a;i=1")
                if leave:
                    admin.api.end_streams()
                    await answer.content.read()
            await until(lambda: not admin.running.handlers)

    with_admin(tmp_path, Script(), check, scope=scope_in(tmp_path)._replace(kind=ScopeKind.USER))


def test_a_journal_that_cannot_be_read_is_said_so(tmp_path: Path, journalctl: Path) -> None:
    (journalctl / "journalctl").write_text("#!/bin/sh\necho 'No access' >&2\nexit 1\n")

    async def check(admin: Administered) -> None:
        (event,) = await admin.events("/api/v1/logs")
        assert event["event"] == "error"
        assert "No access" in event["data"]["message"]

    with_admin(tmp_path, Script(), check, scope=scope_in(tmp_path)._replace(kind=ScopeKind.USER))


def test_without_a_reader_of_the_journal_logs_are_unavailable(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        async with admin.http.get("/api/v1/logs") as answer:
            assert answer.status == 503
            assert (await answer.json())["error"]["code"] == "journal_unreadable"

    with_admin(tmp_path, Script(), check)


def test_the_configuration_is_shown_without_secrets_and_checked(tmp_path: Path) -> None:
    async def check(admin: Administered) -> None:
        dispatcher = admin.running.dispatcher
        config = dispatcher.config
        secret = config.models["m"]._replace(env={"HF_TOKEN": "hf_secret"})
        dispatcher.reconfigure(config._replace(models={**config.models, "m": secret}), {}, 1 << 40)
        shown = await admin.get("/api/v1/config")
        assert shown["models"]["m"]["env"] == {"HF_TOKEN": "(hidden)"}
        assert "hf_secret" not in json.dumps(shown)
        yaml = {"Content-Type": "application/yaml"}
        text = b"models:\n  a: {engine: sim, vrma: 1GiB}\n"
        async with admin.http.post("/api/v1/config/check", data=text, headers=yaml) as answer:
            assert answer.status == 200, await answer.text()
            found = await answer.json()
        assert not found["ok"]
        (problem,) = found["problems"]
        assert (problem["file"], problem["line"], problem["key"]) == ("mmd.yaml", 2, "models.a.vrma")
        assert problem["hint"] == "did you mean vram?"
        async with admin.http.post("/api/v1/config/check", data=b"gpus: {provider: auto}\n", headers=yaml) as answer:
            assert (await answer.json())["ok"]
        async with admin.http.post("/api/v1/reload") as answer:
            assert await answer.json() == {"changed": ["m"], "added": [], "removed": [], "problems": []}

    with_admin(tmp_path, Script(), check)
