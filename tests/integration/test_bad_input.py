"""Requests that cannot be served are answered at once, in OpenAI's error shape, with what to do about it."""

import socket
from collections.abc import Iterator

import pytest
from client import chat, get, post
from testbed import Installation

_MODELS = """
gateway: {max_body: 64KiB}
gpus: {provider: sim, devices: [{memory: 24GiB}]}
models:
  tiny: {engine: sim, vram: 4GiB, aliases: [small], sim: {load_time: 100ms}}
  huge: {engine: sim, vram: 30GiB}
  wide: {engine: sim, vram: 4GiB, gpus: 2}
"""


@pytest.fixture(scope="module")
def strict(installed: Installation) -> Iterator[Installation]:
    installed.configure(_MODELS)
    yield installed
    installed.stop_all()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 30000, "not JSON"),
        (b"{}", "names no model"),
        (b'{"model": 7}', "names no model"),
        (b'{"model": ""}', "names no model"),
    ],
)
def test_a_bad_body_is_a_400(strict: Installation, body: bytes, words: str) -> None:
    answer = post("/v1/chat/completions", body)
    assert answer.status == 400
    assert words in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error"


def test_an_unknown_model_is_a_404_that_names_the_nearest(strict: Installation) -> None:
    answer = chat("tinny")
    assert answer.status == 404
    assert "did you mean 'tiny'?" in answer.error["message"]
    assert answer.error["code"] == "model_not_found"
    assert get("/v1/models/smal").error["message"].endswith("did you mean 'small'?")


def test_a_body_that_is_too_large_is_a_413(strict: Installation) -> None:
    answer = chat("tiny", "x" * 70000)
    assert answer.status == 413
    assert "64KiB (gateway.max_body)" in answer.error["message"]


def test_a_chunked_body_without_a_length_is_bounded_too(strict: Installation) -> None:
    with socket.create_connection(("127.0.0.1", 8000), timeout=10) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100):
                raw.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert raw.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_model_that_can_never_fit_is_refused_with_the_arithmetic(strict: Installation) -> None:
    answer = chat("huge", timeout_s=2)
    assert answer.status == 503
    assert "30.0 GiB" in answer.error["message"]
    assert "24.0 GiB - 1.0 GiB reserve = 23.0 GiB" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert "wide needs 2 GPUs, and this machine has 1" in chat("wide").error["message"]


def test_what_does_not_exist_is_a_404_and_a_wrong_method_a_405(strict: Installation) -> None:
    assert get("/v1/nothing").error["code"] == "not_found"
    answer = get("/v1/chat/completions")
    assert answer.status == 405
    assert answer.error["code"] == "method_not_allowed"


def test_health_says_ok(strict: Installation) -> None:
    assert get("/health").json == {"status": "ok"}


def test_an_engine_s_own_error_keeps_its_status(strict: Installation) -> None:
    answer = post("/v1/chat/completions", {"model": "tiny"})
    assert answer.status == 400
    assert answer.json["error"]["message"]
