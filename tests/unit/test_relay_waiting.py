"""Requests that wait for their model: how long, what they hear meanwhile, and how it ends.

Every test runs twice: with the gateway's one process, and with workers.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anthropic
import openai
import pytest
import relay_gateway
from relay_gateway import OK, Running, Script, chat_bytes, in_step, read_request, relay, run, until

from mmd.config import Gateway
from mmd.gateway.api_error import ApiError
from mmd.gateway.progress import progress
from mmd.gateway.relay.waiting import wait_of
from mmd.names import CPU, UnitName
from mmd.policy.events import Observed, Phase
from mmd.policy.lesson import Lesson

_UNIT = UnitName("m", CPU)
_EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_OFTEN = Gateway(loading_keepalive_s=0.1)


@pytest.fixture(autouse=True, params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setattr(relay_gateway, "default_workers", number)
    return number


@asynccontextmanager
async def loading(
    path: Path, script: Any, start_s: float, settings: Gateway = _OFTEN, **options: Any
) -> AsyncIterator[Running]:
    """A gateway whose model takes a while to start, as it is known to do."""
    async with relay(path, script, ready=False, settings=settings, **options) as running:
        running.lifecycle.start_s = start_s
        running.dispatcher.scheduler.state.lessons["m"] = Lesson(start_s=40)
        yield running


def wait(value: str) -> bytes:
    return f"X-MMD-Wait: {value}\r\n".encode()


def test_a_request_waits_no_longer_than_it_says(tmp_path: Path) -> None:
    async def check() -> None:
        async with loading(tmp_path, Script(), 1.5) as running:
            connection = await running.connect()
            begun = asyncio.get_running_loop().time()
            status, fields, content = await connection.ask(chat_bytes(more=wait("300ms")))
            assert 0.25 < asyncio.get_running_loop().time() - begun < 1.2
            error = json.loads(content)["error"]
            assert (status, error["code"], error["type"]) == (504, "waited_too_long", "server_error")
            assert error["message"] == "m did not become ready within 0.30 s (X-MMD-Wait)"
            assert 38 <= int(fields["retry-after"]) <= 40, "what is left of a start that took 40 s"
            assert "x-should-retry" not in fields
            assert (await connection.ask(chat_bytes(more=wait("20"))))[2] == OK
            assert len(running.lifecycle.actions) == 1, "its start went on"
            await in_step(running, connection)

    run(check())


def test_a_request_that_does_not_wait_starts_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with loading(tmp_path, script, 0.1) as running:
            connection = await running.connect()
            status, fields, content = await connection.ask(chat_bytes(more=wait("0")))
            assert (status, json.loads(content)["error"]["code"], fields["retry-after"]) == (504, "waited_too_long", "40")
            assert running.lifecycle.actions == []
            assert (await connection.ask(chat_bytes()))[0] == 200
            for _ in range(3):
                assert (await connection.ask(chat_bytes(more=wait("0"))))[2] == OK
            assert all(b"mmd-wait" not in head.lower() for head, _ in script.requests), "it is none of the engine's business"
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e3", "5 parsecs", "1" * 400, "\u0663s", "inf"])
def test_what_is_no_duration_is_refused(tmp_path: Path, value: str) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            status, _, content = await connection.ask(chat_bytes(more=f"X-MMD-Wait: {value}\r\n".encode()))
            if not value:
                assert status == 200, "no value is no bound"
            else:
                assert (status, json.loads(content)["error"]["code"]) == (400, "invalid_wait")
                assert not script.requests
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize(("value", "seconds"), [("5s", 5), ("250ms", 0.25), (" 2min ", 120), ("7", 7), ("0.5", 0.5), ("0s", 0)])
def test_durations_are_written_as_in_the_configuration_or_in_seconds(value: str, seconds: float) -> None:
    assert wait_of(value.encode()) == seconds
    with pytest.raises(ApiError, match="is no duration: write 5s"):
        wait_of(value.encode() + b"x")


def test_a_failure_before_the_keepalive_has_its_status(tmp_path: Path) -> None:
    async def check() -> None:
        async with loading(tmp_path, Script(), 5, Gateway(loading_keepalive_s=1)) as running:
            connection = await running.connect()
            status, fields, _ = await connection.ask(chat_bytes(stream=True, more=wait("0.3")))
            assert (status, fields["content-type"]) == (504, "application/json; charset=utf-8")
            await in_step_later(running, connection)

    run(check())


async def in_step_later(running: Running, connection: relay_gateway.Connection) -> None:
    """As `in_step`, for a model that need not wait to be started any more."""
    running.lifecycle.start_s = 0
    await until(lambda: not any(instance.pending for instance in running.dispatcher.scheduler.state.instances.values()))
    await in_step(running, connection)


def test_a_failure_after_it_is_an_event_and_a_clean_end(tmp_path: Path) -> None:
    async def check() -> None:
        async with loading(tmp_path, Script(), 1) as running:
            connection = await running.connect()
            status, fields, content = await connection.ask(chat_bytes(stream=True, more=wait("0.35")))
            assert (status, fields["content-type"]) == (200, "text/event-stream")
            *comments, error, done, rest = content.decode().split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            assert comments
            assert all(comment.startswith(": m is starting") for comment in comments)
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "waited_too_long"
            await in_step_later(running, connection)

    run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_sent_to_who_did_not_ask_for_a_stream_or_where_it_is_off(tmp_path: Path, *, stream: bool) -> None:
    async def check() -> None:
        settings = Gateway(loading_keepalive_s=None) if stream else _OFTEN
        async with loading(tmp_path, Script(), 0.5, settings) as running:
            connection = await running.connect()
            await connection.send(chat_bytes(stream=stream))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await connection.reader.read(1)
            assert (await connection.answer())[2] == OK

    run(check())


def test_who_waits_hears_how_it_goes(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script(*([(_EVENTS, b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")] * 3))
        async with loading(tmp_path, script, 1) as running:
            units = cast("dict[UnitName, object]", running.lifecycle.units)
            units[_UNIT] = SimpleNamespace(status_text="loading weights,\r\n 3 of 8 shards")
            clients = [await running.connect() for _ in range(3)]
            for client in clients:
                await client.send(chat_bytes(stream=True))
                await asyncio.sleep(0.05)  # in this order
            said = [(await client.answer())[2].decode() for client in clients]
            for text, place in zip(said, ("1st", "2nd", "3rd"), strict=True):
                first = text.split("\n")[0]
                assert first.startswith(": m is starting: loading weights, 3 of 8 shards; about "), first
                assert first.endswith(f" s left; {place} in line"), first
                assert text.endswith("data: 1\n\n")
            await in_step(running)

    run(check())


def test_who_waits_for_a_place_hears_that(tmp_path: Path) -> None:
    async def check() -> None:
        go = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                await go.wait()
                writer.write(relay_gateway.ok_answer())

        async with relay(tmp_path, slow, settings=_OFTEN, concurrency=1) as running:
            first, second = await running.connect(), await running.connect()
            await first.send(chat_bytes())
            await until(lambda: running.in_flight == 1)
            await second.send(chat_bytes(stream=True))
            await second.reader.readuntil(b": m is ready: it answers as many requests as it may, 1; 1st in line\n\n")
            go.set()
            assert (await first.answer())[2] == OK

    run(check())


def test_a_busy_model_without_a_queue_answers_429(tmp_path: Path) -> None:
    async def check() -> None:
        go = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                await go.wait()
                writer.write(relay_gateway.ok_answer())

        async with relay(tmp_path, slow, concurrency=1, queue_limit=0) as running:
            first, second = await running.connect(), await running.connect()
            await first.send(chat_bytes())
            await until(lambda: running.in_flight == 1)
            status, fields, content = await second.ask(chat_bytes())
            error = json.loads(content)["error"]
            assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "model_busy")
            assert int(fields["retry-after"]) >= 1
            go.set()
            assert (await first.answer())[2] == OK
            await in_step(running, second)

    run(check())


def test_real_clients_skip_the_comments_and_understand_the_errors(tmp_path: Path) -> None:
    chat = b'data: {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": null}]}\n\n'  # noqa: E501
    done = b"data: [DONE]\n\n"
    message = (
        b'event: message_start\ndata: {"type": "message_start", "message": {"id": "x", "type": "message", "role": "assistant", '
        b'"model": "m", "content": [], "stop_reason": null, "stop_sequence": null, "usage": {"input_tokens": 1, '
        b'"output_tokens": 1}}}\n\nevent: message_stop\ndata: {"type": "message_stop"}\n\n'
    )

    def stream(*events: bytes) -> tuple[bytes, ...]:
        return (_EVENTS, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), b"0\r\n\r\n")

    async def check() -> None:
        script = Script(stream(chat, done), stream(message))
        async with loading(tmp_path, script, 0.6) as running:
            url = f"http://127.0.0.1:{running.port}"
            said: list[Any] = [{"role": "user", "content": "hello"}]
            async with (
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as one,
                anthropic.AsyncAnthropic(base_url=url, api_key="-", max_retries=0) as other,
            ):
                chunks = [c async for c in await one.chat.completions.create(model="m", messages=said, stream=True)]
                assert [c.choices[0].delta.content for c in chunks] == ["hi"]
                running.dispatcher.post(Observed(_UNIT, Phase.STOPPED))
                kinds = [
                    event.type
                    async for event in await other.messages.create(model="m", messages=said, max_tokens=9, stream=True)
                ]
                assert kinds == ["message_start", "message_stop"]
                running.dispatcher.post(Observed(_UNIT, Phase.STOPPED))
                failing = await one.chat.completions.create(
                    model="m", messages=said, stream=True, extra_headers={"X-MMD-Wait": "0.3s"}
                )
                with pytest.raises(openai.APIError, match="did not become ready within"):
                    async for _ in failing:
                        pass
                running.dispatcher.post(Observed(_UNIT, Phase.STOPPED))
                with pytest.raises(openai.APIStatusError) as refused:
                    await one.chat.completions.create(model="m", messages=said, stream=True, extra_headers={"X-MMD-Wait": "0"})
                assert (refused.value.status_code, refused.value.code) == (504, "waited_too_long")

    run(check())


def test_a_request_that_moves_takes_what_is_left_of_its_wait_along(tmp_path: Path) -> None:
    async def check() -> None:
        async with loading(tmp_path, Script(), 5, workers=0) as running:
            given: list[bytes] = []

            def heir(connection: int, read: bytes, chunked: bool | None, let_in: bool) -> None:
                os.close(connection)
                given.append(read)

            client = await running.connect()
            await client.send(chat_bytes(more=wait("10s")))
            await until(lambda: running.dispatcher.scheduler.state.waiting)
            await asyncio.sleep(0.3)
            running.server.hand_over(heir)
            await until(lambda: given)
            lines = dict(line.split(b": ", 1) for line in given[0].split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
            assert 9 < float(lines[b"X-MMD-Wait"]) < 9.75
            assert running.lifecycle.actions

    run(check())


def test_words_are_one_line_and_name_nobody_else(tmp_path: Path) -> None:
    async def check() -> None:
        async with loading(tmp_path, Script(), 5) as running:
            dispatcher = running.dispatcher
            state, model = dispatcher.scheduler.state, dispatcher.config.models["m"]
            now = asyncio.get_running_loop().time()
            assert progress(state, model, 7, {}, now) == "m is stopped: it waits for room; about 40 s left"
            state.lessons["m"] = replace(state.lessons["m"], start_s=None)
            assert progress(state, model, 7, {}, now) == "m is pending: it waits for room", "no guesses"

    run(check())
