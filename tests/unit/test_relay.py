"""The relay on real sockets: what goes through, to engines that a test writes and to the application.

Every test runs twice: with the gateway's one process, and with workers.
"""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
import relay_gateway
from aiohttp import web
from relay_gateway import (
    OK,
    Script,
    body_of,
    chat_bytes,
    in_step,
    ok_answer,
    read_request,
    relay,
    run,
    until,
)

from mmd.config import Gateway
from mmd.gateway.relay.client import ClientConnection


@pytest.fixture(autouse=True, params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setattr(relay_gateway, "default_workers", number)
    return number


def test_requests_of_both_kinds_share_a_connection(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            for _ in range(3):
                assert (await connection.ask(chat_bytes()))[0] == 200
                listed = await connection.ask(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
                assert json.loads(listed[2])["data"][0]["id"] == "m"
                assert (await connection.ask(b"GET /v1/models/none HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 404
            assert script.connections <= running.relays, "the engine's connection was kept"
            await until(lambda: not running.handlers)
            await in_step(running, connection)

    run(check())


def test_the_engine_gets_the_request_without_what_is_not_for_it(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            more = (
                b"Authorization: Bearer k\r\nCookie: c\r\nX-Request-Id: 7\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
                b"TE: trailers\r\nAccept-Encoding: gzip\r\nProxy-Authorization: p\r\nContent-Type: application/json\r\n"
            )
            for _ in range(2):  # parsed, then known
                await connection.ask(chat_bytes(more=more))
            heads = [head for head, _ in script.requests]
            length = len(body_of("m"))
            assert heads[0] == heads[1]
            assert heads[0].decode().splitlines() == [
                "POST /v1/chat/completions HTTP/1.1",
                "Host: localhost",
                "X-Request-Id: 7",
                "Content-Type: application/json",
                f"Content-Length: {length}",
                "",
            ]
            await in_step(running, connection)

    run(check())


def test_an_alias_reaches_the_engine_as_the_model_and_the_rest_unchanged(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            body = b'{"n": 1.10, "big": 12345678901234567890123, "model": "alias-of-m", "t": "\\u00e9"}'
            head = b"POST /v1/completions?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            assert (await connection.ask(head + body))[0] == 200
            sent = script.requests[0][1]
            assert sent == b'{"n":1.10,"big":12345678901234567890123,"model":"m","t":"\\u00e9"}'
            assert script.requests[0][0].startswith(b"POST /v1/completions?a=b HTTP/1.1\r\n")
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize("step", [1, 3, 50])
def test_a_request_may_come_in_pieces(tmp_path: Path, step: int) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            connection = await running.connect()
            for request in (chat_bytes(), _chunked_request(b"8\r\n", b"\r\n")):
                for start in range(0, len(request), step):
                    await connection.send(request[start : start + step])
                    await asyncio.sleep(0)
                assert (await connection.answer())[2] == OK
            await in_step(running, connection)

    run(check())


def _chunked_request(first: bytes, second: bytes) -> bytes:
    body = body_of("m")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + first + body[:8] + second + b"%x\r\n" % len(body[8:]) + body[8:] + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize(
    "answer",
    [
        ok_answer(),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(OK), OK),
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok_answer(),
    ],
    ids=["length", "chunked", "interim answers first"],
)
def test_an_answer_may_come_in_pieces(tmp_path: Path, answer: bytes, step: int) -> None:
    async def check() -> None:
        script = Script(tuple(answer[start : start + step] for start in range(0, len(answer), step)))
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes()))[2] == OK
            await in_step(running, connection)
            assert script.connections == 1

    run(check())


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script(*(ok_answer(b'{"n": %d}' % number) for number in range(20)))
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            models = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
            await connection.send((chat_bytes() + models + chat_bytes("nobody")) * 20)
            for number in range(20):
                assert json.loads((await connection.answer())[2]) == {"n": number}
                assert json.loads((await connection.answer())[2])["object"] == "list"
                assert (await connection.answer())[0] == 404
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost:x\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost:x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"PUT /v1/completions HTTP/1.1\r\nHost:x\r\n\r\n",
    ],
    ids=["length", "chunked", "no body"],
)
def test_thousands_of_pipelined_requests_are_refused_one_by_one(tmp_path: Path, request_bytes: bytes) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            connection = await running.connect()
            count = 4000  # in one read, and answered in the call stack of that read
            await connection.send(request_bytes * count)
            for _ in range(count):
                assert (await connection.answer())[0] in (400, 405)
            await in_step(running, connection)

    run(check())


def test_a_client_far_ahead_is_not_read_further(tmp_path: Path, workers: int) -> None:
    async def check() -> None:
        go = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                await go.wait()
                writer.write(ok_answer())

        async with relay(tmp_path, slow) as running:
            connection = await running.connect()
            count = 200_000
            connection.writer.write(chat_bytes() + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * count)
            if not workers:  # whose memory cannot be looked at
                await until(lambda: [c for c in running.server.connections if c._paused])
                held: ClientConnection = next(iter(running.server.connections))
                assert len(held._ahead) < 1 << 20
            go.set()
            assert (await connection.answer())[2] == OK
            for _ in range(1000):
                assert (await connection.answer())[0] == 200
            connection.writer.transport.abort()  # closing would wait until all the others are answered
            await in_step(running)

    run(check())


def test_http_1_0_clients_get_what_they_understand(tmp_path: Path) -> None:
    async def check() -> None:
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
        async with relay(tmp_path, Script(ok_answer(), chunked, ok_answer())) as running:
            connection = await running.connect()
            status, fields, _ = await connection.ask(chat_bytes(version=b"1.0", more=b"Connection: keep-alive\r\n"))
            assert (status, fields["connection"]) == (200, "keep-alive")
            status, fields, content = await connection.ask(chat_bytes(version=b"1.0", more=b"Connection: keep-alive\r\n"))
            assert (status, content) == (200, b"abcdef")
            assert "transfer-encoding" not in fields
            assert fields["connection"] == "close"
            connection = await running.connect()
            assert (await connection.ask(chat_bytes(version=b"1.0")))[1]["connection"] == "close"
            assert await connection.rest() == b""
            await in_step(running)

    run(check())


def test_an_answer_without_a_length_ends_with_its_connection(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script((b"HTTP/1.0 200 OK\r\n\r\n", b"abc", b"def"), close=True)
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            status, fields, content = await connection.ask(chat_bytes())
            assert (status, content, fields["transfer-encoding"]) == (200, b"abcdef", "chunked")
            await in_step(running, connection)
            assert script.connections == 2

    run(check())


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body_have_none(tmp_path: Path, status: bytes) -> None:
    async def check() -> None:
        script = Script(b"HTTP/1.1 %b\r\nX-A: b\r\n\r\n" % status)
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            answer = await connection.ask(chat_bytes())
            assert answer[0] == int(status[:3])
            assert "transfer-encoding" not in answer[1]
            await in_step(running, connection)
            assert script.connections == 1

    run(check())


def test_head_and_wrong_methods(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            connection = await running.connect()
            await connection.send(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await connection.answer("HEAD"))[0] == 200
            await connection.send(b"HEAD /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await connection.answer("HEAD"))[0] == 405
            assert (await connection.ask(b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 405
            assert (await connection.ask(b"GET http://other/health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
            await in_step(running, connection)

    run(check())


def test_expect_is_answered_once_the_request_is_welcome(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(max_body_bytes=100)) as running:
            body = body_of("m")
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
            connection = await running.connect()
            await connection.send(head % len(body))
            assert (await connection.reader.readexactly(25)) == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert (await connection.ask(body))[0] == 200
            await connection.send(head % 101)
            assert (await connection.answer())[0] == 413
            assert await connection.rest() == b""
            await in_step(running)

    run(check())


def test_tokens_are_counted_from_the_end_of_an_answer(tmp_path: Path) -> None:
    async def check() -> None:
        events = [b'data: {"choices": [{"delta": {"content": "a \\"usage\\": {\\"completion_tokens\\": 999}"}}]}\n\n'] * 50
        events += [b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 50}}\n\n', b"data: [DONE]\n\n"]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        stream = (head, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), b"0\r\n\r\n")
        responses = ok_answer(b'{"output": [], "usage": {"input_tokens": 3, "output_tokens": 4}, "metadata": {}}')
        async with relay(tmp_path, Script(ok_answer(), stream, responses, ok_answer(b"{}"))) as running:
            connection = await running.connect()
            for request in (chat_bytes(), chat_bytes(stream=True), chat_bytes(), chat_bytes()):
                assert (await connection.ask(request))[0] == 200
            counters = running.inference.counters_of("m")
            await until(lambda: counters.requests == 4)  # workers tell once a second
            assert (counters.prompt_tokens, counters.completion_tokens) == (9 + 5 + 3, 2 + 50 + 4)
            assert (counters.requests, counters.statuses) == (4, {200: 4})
            assert counters.sent_bytes > sum(map(len, events))
            await in_step(running, connection)

    run(check())


def test_a_waiting_stream_gets_comments_then_events_in_one_framing(tmp_path: Path) -> None:
    async def check() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata: 1\n\n"
        error = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nnope"
        settings = Gateway(loading_keepalive_s=0.05)
        async with relay(tmp_path, Script(head, error), settings=settings, ready=False) as running:
            running.lifecycle.start_s = 0.3
            connection = await running.connect()
            status, fields, content = await connection.ask(chat_bytes(stream=True))
            assert (status, fields["content-type"]) == (200, "text/event-stream")
            lines = content.decode().split("\n\n")
            assert lines[0].startswith(": m is ")
            assert lines[-2:] == ["data: 1", ""]
            status, _, content = await connection.ask(chat_bytes(stream=True))
            assert (status, content) == (400, b"nope"), "nothing was begun, so the status says it"
            await in_step(running, connection)

    run(check())


def test_an_error_that_is_cut_after_comments_is_an_event_all_the_same(tmp_path: Path) -> None:
    async def check() -> None:
        error = b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n4\r\np"
        settings = Gateway(loading_keepalive_s=0.05)
        async with relay(tmp_path, Script(error, close=True), settings=settings, ready=False) as running:
            running.lifecycle.start_s = 0.2
            connection = await running.connect()
            _, _, content = await connection.ask(chat_bytes(stream=True))
            events = content.decode().split("\n\n")
            assert events[-2] == "data: [DONE]"
            assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "engine_failed"
            await in_step(running, connection)

    run(check())


def test_an_error_after_comments_is_an_event(tmp_path: Path) -> None:
    async def check() -> None:
        error = b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nnope\r\n0\r\n\r\n"
        async with relay(tmp_path, Script(error), settings=Gateway(loading_keepalive_s=0.05), ready=False) as running:
            running.lifecycle.start_s = 0.2
            connection = await running.connect()
            _, _, content = await connection.ask(chat_bytes(stream=True))
            events = content.decode().split("\n\n")
            assert events[-2] == "data: [DONE]"
            told = json.loads(events[-3].removeprefix("data: "))["error"]
            assert (told["code"], told["message"]) == ("engine_error", "the engine answered 400: nope")
            await in_step(running, connection)

    run(check())


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), ready=False) as running:
            running.lifecycle.start_s = 30
            connection = await running.connect()
            await connection.send(chat_bytes())
            await until(lambda: running.in_flight == 1)
            await connection.close()
            await until(lambda: running.in_flight == 0)

    run(check())


def test_websockets_are_tunnelled(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data + f" from {request.remote}")
        return socket

    async def check() -> None:
        async with relay(tmp_path, Script(), routes=(web.get("/echo", echo),)) as running:
            url = f"http://127.0.0.1:{running.port}/echo"
            async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
                for number in range(100):
                    await socket.send_str(str(number) * 1000)
                    assert await socket.receive_str() == str(number) * 1000 + " from 127.0.0.1"
            await until(lambda: not running.server.connections)
            await in_step(running)

    run(check())


def test_uploads_stream_through_under_back_pressure(tmp_path: Path) -> None:
    async def upload(request: web.Request) -> web.Response:
        size = 0
        async for piece in request.content.iter_any():
            size += len(piece)
            await asyncio.sleep(0)
        return web.Response(text=str(size))

    async def check() -> None:
        async with relay(tmp_path, Script(), routes=(web.post("/upload", upload),)) as running:
            connection = await running.connect()
            size = 8 << 20
            await connection.send(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
            assert (await connection.answer())[2] == str(size).encode()
            chunks = b"".join(b"%x\r\n%b\r\n" % (1000, b"y" * 1000) for _ in range(1000)) + b"0\r\n\r\n"
            await connection.send(b"POST /upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
            assert (await connection.answer())[2] == b"1000000"
            await in_step(running, connection)

    run(check())


def test_a_client_that_leaves_cancels_its_handler(tmp_path: Path) -> None:
    async def check() -> None:
        ended = asyncio.Event()

        async def endless(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"x" * 1000)
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        async with relay(tmp_path, Script(), routes=(web.get("/endless", endless),)) as running:
            connection = await running.connect()
            await connection.send(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            await connection.reader.readuntil(b"xxx")
            connection.writer.transport.abort()
            async with asyncio.timeout(5):
                await ended.wait()
            await in_step(running)

    run(check())


def test_leaving_finishes_what_was_accepted(tmp_path: Path) -> None:
    async def check() -> None:
        pieces = (b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n", *([b"a"] * 60))
        async with relay(tmp_path, Script(pieces)) as running:
            streaming, fresh, kept = [await running.connect() for _ in range(3)]
            assert (await kept.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
            await streaming.send(chat_bytes())
            await streaming.reader.readuntil(b"\r\n\r\na")
            left = asyncio.create_task(running.leave(20))
            await asyncio.sleep(0.1)  # workers hear of it
            status, fields, _ = await fresh.ask(chat_bytes())
            assert (status, fields["connection"]) == (200, "close")
            assert await streaming.reader.readexactly(59) == b"a" * 59
            await left
            assert await kept.rest() == b""

    run(check())
