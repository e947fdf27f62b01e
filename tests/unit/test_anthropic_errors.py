"""Errors of Anthropic's paths: of its shape, in whole answers and in streams, and only there."""

import json
from pathlib import Path

import pytest
import relay_gateway
from relay_gateway import Connection, Script, chat_bytes, relay, run

from mmd.config import Gateway
from mmd.gateway.api_error import ApiError, speaks_anthropic

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True, params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_gateway, "default_workers", request.param)


def messages(model: str = "m", path: bytes = b"/v1/messages") -> bytes:
    return chat_bytes(model, stream=True).replace(b"/v1/chat/completions", path)


async def events(connection: Connection, request: bytes) -> list[str]:
    status, fields, content = await connection.ask(request)
    assert (status, fields["content-type"]) == (200, "text/event-stream")
    return content.decode().split("\n\n")


def error_in(event: str) -> dict[str, str]:
    name, data = event.split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["type"] == "error"
    error: dict[str, str] = told["error"]
    return error


def test_a_stream_that_is_cut_ends_with_anthropics_error(tmp_path: Path) -> None:
    async def check() -> None:
        cut = HEAD + b"9\r\ndata: 1\n\n\r\n"
        for path in (b"/v1/messages", b"/upstream/m/v1/messages"):
            async with relay(tmp_path, Script(cut, close=True)) as running:
                first, error, end = await events(await running.connect(), messages(path=path))
                assert (first, end) == ("data: 1", ""), "and nothing else follows: there is no [DONE]"
                assert error_in(error)["type"] == "api_error"
                assert "broke the connection" in error_in(error)["message"]

    run(check())


def test_an_error_after_comments_is_anthropics_event(tmp_path: Path) -> None:
    async def check() -> None:
        refusal = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nnope"
        settings = Gateway(loading_keepalive_s=0.05)
        async with relay(tmp_path, Script(refusal), settings=settings, ready=False) as running:
            running.lifecycle.start_s = 0.2
            *comments, error, end = await events(await running.connect(), messages())
            assert comments
            assert all(comment.startswith(": m is ") for comment in comments)
            assert end == ""
            assert error_in(error) == {"type": "rate_limit_error", "message": "the engine answered 429: nope"}

    run(check())


def test_an_answer_that_is_an_error(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            connection = await running.connect()
            for path in (b"/v1/messages", b"/v1/messages/count_tokens"):
                status, fields, content = await connection.ask(messages("zzz", path))
                assert (status, fields["content-type"]) == (404, "application/json; charset=utf-8")
                assert json.loads(content) == {
                    "type": "error",
                    "error": {
                        "type": "not_found_error",
                        "message": "the model 'zzz' does not exist; GET /v1/models lists those that do",
                    },
                }
            status, _, content = await connection.ask(chat_bytes("zzz"))
            assert json.loads(content)["error"]["code"] == "model_not_found"

    run(check())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_the_kinds_of_errors(status: int, kind: str) -> None:
    error = ApiError(status, "why", code="x", tail=("a log line",))
    assert json.loads(error.content(b"/v1/messages")) == {
        "type": "error",
        "error": {"type": kind, "message": "why\na log line"},
    }
    assert "code" in json.loads(error.content(b"/v1/embeddings"))["error"]


def test_which_paths_are_anthropics() -> None:
    for path in (b"/v1/messages", b"/v1/messages/count_tokens", b"/upstream/a/b/v1/messages"):
        assert speaks_anthropic(path)
    for path in (b"", b"/v1/message", b"/v1/messages/", b"/x/v1/messages", b"/upstream/v1/messages/x", b"/v1/models"):
        assert not speaks_anthropic(path)
