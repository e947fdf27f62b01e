"""Clients and engines that misbehave, on real sockets: after every kind of trouble the same connection (if it still lives) and
another one are in step."""

import asyncio
import json
from pathlib import Path
from typing import cast

import pytest
from relay_gateway import (
    OK,
    Script,
    chat_bytes,
    gateway,
    in_step,
    ok_answer,
    read_request,
    relay,
    run,
    until,
)
from test_relay_head import BAD_CHUNKS, REFUSED_REQUESTS, REFUSED_RESPONSES

from mmd.config import Gateway, Timeouts

# A client's trouble.


@pytest.mark.parametrize("name", REFUSED_REQUESTS)
def test_a_malformed_request_is_refused_and_its_connection_closed(tmp_path: Path, name: str) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes()))[0] == 200
            data = REFUSED_REQUESTS[name]
            await connection.send(data.replace(b"/v1/x", b"/v1/chat/completions") + chat_bytes())
            status, fields, content = await connection.answer("POST")
            assert 400 <= status < 600
            assert json.loads(content)["error"]["code"] == "bad_http"
            assert fields["connection"] == "close"
            assert await connection.rest() == b"", "the bytes behind it are not taken for a request"
            assert len(script.requests) == 1
            await in_step(running)

    run(check())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_a_malformed_body_is_refused_and_its_connection_closed(tmp_path: Path, name: str, path: str) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            await connection.send(head + BAD_CHUNKS[name] + chat_bytes())
            assert (await connection.answer())[0] in (400, 405)
            assert await connection.rest() == b""
            assert script.requests == []
            await in_step(running)

    run(check())


def test_a_smuggled_request_is_content_and_nothing_else(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            inner = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
            body = b'{"model": "m", "x": "' + inner.replace(b"\r\n", b"\\r\\n") + b'"}' + inner
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            assert (await connection.ask(head + body))[0] == 400, "not JSON"
            for field in (b"Content_Length: 0\r\n", b"X-Content-Length: 0\r\n", b"Connection: close, Content-Length\r\n"):
                other = connection if b"close" not in field else await running.connect()
                assert (await other.ask(chat_bytes(more=field)))[2] == OK
            await in_step(running, connection)

    run(check())


def test_a_body_that_is_too_large_is_refused_while_it_comes(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(max_body_bytes=1 << 16)) as running:
            for head in (b"Content-Length: 10000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
                connection = await running.connect()
                await connection.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + head)
                for _ in range(64):
                    connection.writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                status, fields, _ = await connection.answer()
                assert (status, fields["connection"]) == (413, "close")
                await connection.close()
            await in_step(running)

    run(check())


@pytest.mark.parametrize("sent", [0, 10, len(chat_bytes()) - 1, len(chat_bytes())])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_ends_everything_for_it(tmp_path: Path, sent: int, *, reset: bool) -> None:
    async def check() -> None:
        script = Script((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *([b"1\r\na\r\n"] * 10_000)))
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            await connection.send(chat_bytes()[:sent])
            if sent == len(chat_bytes()):
                await connection.reader.readuntil(b"\r\n\r\n1\r\na")
                assert running.in_flight == 1
            connection.writer.transport.abort() if reset else connection.writer.close()
            await until(lambda: not running.server.connections and running.in_flight == 0)
            await until(lambda: script.lost == script.connections)
            script.answers.clear()
            await in_step(running)

    run(check())


def test_a_slow_reader_holds_the_engine_and_not_our_memory(tmp_path: Path) -> None:
    async def check() -> None:
        size, piece = 64 << 20, b"x" * (1 << 16)
        written = 0

        async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while written < size:
                writer.write(piece)
                written += len(piece)
                await writer.drain()
            await reader.read()

        async with relay(tmp_path, large) as running:
            connection = await running.connect()
            await connection.send(chat_bytes())
            held = next(iter(running.server.connections))
            await until(lambda: held.stalled)
            await asyncio.sleep(0.1)
            assert held.transport is not None
            assert held.transport.get_write_buffer_size() < 1 << 20
            assert written < 32 << 20, "the rest waits at the engine"
            assert len((await connection.answer())[2]) == size
            await connection.close()

    run(check())


# An engine's trouble.


@pytest.mark.parametrize("name", [*REFUSED_RESPONSES, *(f"chunks: {name}" for name in BAD_CHUNKS)])
def test_a_malformed_answer_never_looks_complete(tmp_path: Path, name: str) -> None:
    async def check() -> None:
        chunks = name.removeprefix("chunks: ")
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = REFUSED_RESPONSES[name] if chunks == name else head + BAD_CHUNKS[chunks]
        script = Script(answer)
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            await connection.send(chat_bytes())
            if chunks == name:
                status, _, content = await connection.answer()
                assert (status, json.loads(content)["error"]["code"]) == (502, "engine_failed")
                await in_step(running, connection)
            else:
                assert not (await connection.rest()).endswith(b"0\r\n\r\n")
                await in_step(running)
            assert script.connections == 2, "the engine's connection was not used again"

    run(check())


def test_interim_answers_without_end_are_no_answer(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 50 + ok_answer())
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            status, _, content = await connection.ask(chat_bytes())
            assert (status, json.loads(content)["error"]["code"]) == (502, "engine_failed")
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize(
    "answer",
    [
        ok_answer()[:-10],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n",
    ],
    ids=["content", "in a chunk", "between chunks", "before the end"],
)
def test_an_answer_that_is_cut_never_looks_complete(tmp_path: Path, answer: bytes) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(answer, close=True)) as running:
            connection = await running.connect()
            await connection.send(chat_bytes())
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await connection.answer()
            await in_step(running)

    run(check())


def test_a_cut_event_stream_ends_with_an_error_event(tmp_path: Path) -> None:
    async def check() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with relay(tmp_path, Script(head + b"9\r\ndata: 1\n\n\r\n", close=True)) as running:
            connection = await running.connect()
            status, _, content = await connection.ask(chat_bytes(stream=True))
            events = content.decode().split("\n\n")
            assert (status, events[0], events[2]) == (200, "data: 1", "data: [DONE]")
            assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_failed"
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize("extra", [b"x", ok_answer(), b"HTTP/1.1 200 OK\r\n"])
def test_an_engine_that_sends_too_much_is_not_trusted_again(tmp_path: Path, extra: bytes) -> None:
    async def check() -> None:
        script = Script(ok_answer() + extra)
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes()))[2] == OK
            assert await connection.rest() == b"", "nor is the client's connection, after an answer of doubtful end"
            await in_step(running)
            assert script.connections == 2

    run(check())


def test_an_engine_that_speaks_unasked_is_cut_off(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script((ok_answer(), b"", b"", ok_answer(b'"stray"')))
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes()))[2] == OK
            await until(lambda: script.lost == 1)
            await in_step(running, connection)

    run(check())


def test_a_connection_that_died_idle_is_replaced_unseen(tmp_path: Path) -> None:
    async def check() -> None:
        served = 0

        async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            await read_request(reader)
            writer.write(ok_answer())
            served += 1
            await reader.readexactly(1)  # a second request comes, and is not answered

        async with relay(tmp_path, once) as running:
            connection = await running.connect()
            for _ in range(5):
                assert (await connection.ask(chat_bytes()))[2] == OK
            assert served == 5
            await connection.close()
            await until(lambda: running.in_flight == 0)

    run(check())


def test_a_fresh_connection_that_dies_unanswered_is_a_502(tmp_path: Path) -> None:
    async def check() -> None:
        async def dead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)

        async with relay(tmp_path, dead) as running:
            connection = await running.connect()
            status, fields, content = await connection.ask(chat_bytes())
            assert (status, json.loads(content)["error"]["code"], fields["retry-after"]) == (502, "engine_failed", "1")
            status, _, _ = await connection.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert status == 200
            assert running.in_flight == 0
            await connection.close()

    run(check())


def test_nobody_listening_restarts_the_engine_once(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway({"m": f"unix:{tmp_path}/nobody.sock"}) as running:
            connection = await running.connect()
            status, _, content = await connection.ask(chat_bytes())
            assert (status, json.loads(content)["error"]["code"]) == (502, "engine_unreachable")
            assert [type(action).__name__ for action in running.lifecycle.actions] == ["Stop", "Start"]
            assert running.in_flight == 0
            await connection.close()

    run(check())


def test_every_client_is_looked_at_however_many_there_are(tmp_path: Path) -> None:
    class Silent:
        def __init__(self) -> None:
            self.looks = 0

        def check(self, now: float, allowed: Timeouts) -> None:
            self.looks += 1

    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            silent = [Silent() for _ in range(300)]
            connections = cast("set[object]", running.server.connections)
            connections |= set(silent)
            await until(lambda: all(one.looks for one in silent))
            connections -= set(silent)

    run(check())
