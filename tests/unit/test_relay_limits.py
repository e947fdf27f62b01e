"""What clients may take: heads, bodies, time, connections. Beyond that they are told so, and everybody else goes on.

Every test runs twice: with the gateway's one process, and with workers.
"""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import relay_gateway
from aiohttp import web
from relay_gateway import (
    OK,
    Connection,
    Running,
    Script,
    chat_bytes,
    in_step,
    ok_answer,
    outer_address,
    read_request,
    relay,
    run,
    until,
)

from mmd.config import Gateway, Timeouts
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.clients import Clients, client_of, forwarded_for, is_trusted

_MIB = 1 << 20
_HASTY = Gateway(timeouts=Timeouts(idle_s=0.5, request_s=0.5, stalled_s=0.5))


@pytest.fixture(autouse=True, params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setattr(relay_gateway, "default_workers", number)
    return number


async def drip(connection: Connection, data: bytes, every_s: float = 0.05) -> None:
    """Send byte by byte, for as long as somebody takes it."""
    for number in range(len(data)):
        connection.writer.write(data[number : number + 1])
        await asyncio.sleep(every_s)
        if connection.reader.at_eof() or connection.writer.is_closing():
            return


@pytest.mark.parametrize("more", [b"", b"X-Slow: " + b"x" * 200 + b"\r\n"])
def test_a_head_that_drips_in_is_not_waited_for(tmp_path: Path, more: bytes) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script, settings=_HASTY) as running:
            slow = [await running.connect() for _ in range(20)]
            drips = [asyncio.create_task(drip(each, chat_bytes(more=more))) for each in slow]
            await in_step(running)
            for each in slow:
                status, fields, content = await each.answer()
                assert (status, json.loads(content)["error"]["code"]) == (408, "request_timeout")
                assert fields["connection"] == "close"
            for task in drips:
                task.cancel()
            await asyncio.gather(*drips, return_exceptions=True)
            assert len(script.requests) == 1
            await in_step(running)

    run(check())


def test_a_body_must_go_on(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(timeouts=_HASTY.timeouts._replace(body_rate_bytes=20))
        async with relay(tmp_path, Script(), settings=settings) as running:
            slow, hanging = await running.connect(), await running.connect()
            request = chat_bytes()
            await hanging.send(request[:-20])
            await slow.send(request[:-10])
            for byte in request[-10:]:  # slow, but never silent, and faster than it must be
                await asyncio.sleep(0.2)
                await slow.send(bytes((byte,)))
            assert (await slow.answer())[2] == OK
            status, _, content = await hanging.answer()
            assert (status, json.loads(content)["error"]["code"]) == (408, "request_timeout")

    run(check())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_drips_in_is_not_waited_for(tmp_path: Path, chunked: bool) -> None:
    """Something comes all the time, but not enough, and what it takes of max_buffered is free again."""

    async def check() -> None:
        settings = Gateway(timeouts=_HASTY.timeouts._replace(body_rate_bytes=10_000))
        async with relay(tmp_path, Script(), settings=settings) as running:
            slow = await running.connect()
            framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 50000"
            await slow.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % framing)
            dripping = asyncio.create_task(drip(slow, b"1\r\n{\r\n" * 200 if chunked else b"{" * 200))
            status, _, content = await slow.answer()
            assert (status, json.loads(content)["error"]["code"]) == (408, "request_timeout")
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
            assert running.inference.held_bytes == 0
            await in_step(running)

    run(check())


def test_a_body_that_comes_at_the_rate_may_take_long(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(timeouts=_HASTY.timeouts._replace(body_rate_bytes=10_000))
        async with relay(tmp_path, Script(), settings=settings) as running:
            steady = await running.connect()
            request = chat_bytes(size=40_000)
            for at in range(0, len(request), 2000):  # 20,000 bytes a second, for 2 s
                await steady.send(request[at : at + 2000])
                await asyncio.sleep(0.1)
            assert (await steady.answer())[2] == OK

    run(check())


@pytest.mark.parametrize("kind", ["complete", "stream", "application", "websocket"])
def test_a_client_that_does_not_read_the_last_bytes_is_cut_off(tmp_path: Path, kind: str, workers: int) -> None:
    """What waits in the gateway is less than stops it from writing (64 KiB), after the kernel has taken what it takes."""
    if workers:
        pytest.skip("how much waits can be seen in this process only, and the code is the same")
    piece = b"x" * 4096
    clients: list[ClientConnection] = []

    def waiting() -> int:
        return sum(each.transport.get_write_buffer_size() for each in clients if each.transport is not None)

    async def fill(write: Callable[[bytes], Awaitable[None]]) -> None:
        while not waiting():
            await write(piece)
            await asyncio.sleep(0.002)  # the gateway has written it, as far as the kernel takes it

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(data: bytes) -> None:
            writer.write(data if kind == "websocket" else b"%x\r\n%b\r\n" % (len(data), data))
            await writer.drain()

        await reader.readuntil(b"\r\n\r\n")
        if kind == "websocket":
            writer.write(b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        else:
            kinds = b"text/event-stream" if kind == "stream" else b"text/plain"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kinds)
        await fill(write)
        if kind == "complete":
            writer.write(b"0\r\n\r\n")
        await reader.read()
        await asyncio.sleep(20)

    async def follow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await fill(response.write)
        await asyncio.sleep(20)
        return response

    requests = {
        "application": b"GET /follow HTTP/1.1\r\nHost: x\r\n\r\n",
        "websocket": b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    }

    async def check() -> None:
        loop = asyncio.get_running_loop()
        settings = Gateway(timeouts=Timeouts(idle_s=60, request_s=60, stalled_s=1.0))
        async with relay(tmp_path, serve, settings=settings, routes=(web.get("/follow", follow),)) as running:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.connect((running.host, running.port))
                client.setblocking(False)
                await loop.sock_sendall(client, requests.get(kind, chat_bytes(stream=kind == "stream")))
                await until(lambda: running.server.connections)
                clients.extend(running.server.connections)
                await until(waiting)
                assert waiting() < 64 << 10
                assert not clients[0].stalled
                await asyncio.sleep(0.5)
                assert running.server.connections, "it had some time"
                await until(lambda: not running.server.connections)
                await until(lambda: running.in_flight == 0)

    run(check())


def test_idle_connections_are_closed_and_those_that_wait_are_not(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_HASTY, ready=False) as running:
            running.lifecycle.start_s = 2.5
            idle, waiting = [await running.connect() for _ in range(10)], await running.connect()
            await waiting.send(chat_bytes())
            for each in idle:
                assert await each.rest() == b""
            assert (await waiting.answer())[2] == OK

    run(check())


def test_who_does_not_read_is_cut_off_and_its_engine_freed(tmp_path: Path) -> None:
    async def check() -> None:
        lost = asyncio.Event()

        async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            try:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * _MIB))
                for _ in range(64):
                    writer.write(b"x" * _MIB)
                    await writer.drain()
            finally:
                lost.set()

        async with relay(tmp_path, large, settings=_HASTY) as running:
            connection = await running.connect()
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await connection.send(chat_bytes())
            async with asyncio.timeout(5):
                await lost.wait()
            await until(lambda: running.in_flight == 0)

    run(check())


def test_the_size_of_heads_is_a_setting(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(max_head_bytes=5000)) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes(more=b"X-A: " + b"a" * 4500 + b"\r\n")))[2] == OK
            status, _, content = await connection.ask(chat_bytes(more=b"X-A: " + b"a" * 5000 + b"\r\n"))
            assert (status, json.loads(content)["error"]["code"]) == (431, "bad_http")
        async with relay(tmp_path, Script(), settings=Gateway(max_head_bytes=100_000)) as running:
            connection = await running.connect()
            assert (await connection.ask(chat_bytes(more=b"X-A: " + b"a" * 90_000 + b"\r\n")))[2] == OK
            await in_step(running, connection)

    run(check())


# Connections.


async def served(connections: list[Connection]) -> int:
    """How many of them are, while the others are told why not."""
    answers = [await each.answer() for each in connections]
    for status, fields, content in answers:
        if status != 200:
            error = json.loads(content)["error"]
            assert (status, error["code"], fields["connection"]) == (429, "too_many_connections", "close")
    return sum(status == 200 for status, _, _ in answers)


def test_a_client_has_no_more_connections_than_it_may(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(connections_per_client=3), host=outer_address()) as running:
            connections = [await running.connect() for _ in range(40)]
            for each in connections:
                await each.send(chat_bytes())
            count = await served(connections)
            if running.staff is None:
                assert count == 3
            else:
                assert 3 <= count <= 6, "each of two processes counts its own"
            for each in connections:
                await each.close()
            await asyncio.sleep(0.2)
            again = [await running.connect() for _ in range(3)]
            for each in again:
                await each.send(chat_bytes())
            assert await served(again) == 3

    run(check())


def test_a_limit_that_is_lifted_or_set_counts_from_then_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(connections_per_client=1), host=outer_address()) as running:
            await configure(running, Gateway(connections_per_client=None))
            many = [await running.connect() for _ in range(10)]
            for each in many:
                await each.send(chat_bytes())
            assert await served(many) == 10
            await configure(running, Gateway(connections_per_client=1))
            more = [await running.connect() for _ in range(10)]
            for each in more:
                await each.send(chat_bytes())
            assert 1 <= await served(more) <= running.relays
            for each in many:
                assert (await each.ask(chat_bytes()))[0] == 200

    run(check())


async def configure(running: Running, settings: Gateway) -> None:
    config = running.dispatcher.config._replace(gateway=settings._replace(hosts=("x",)))
    running.dispatcher.reconfigure(config, {}, 1 << 40)
    if running.staff is not None:
        running.staff.configure(config)
        await asyncio.sleep(0.1)


def test_connections_that_move_between_processes_are_not_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(connections_per_client=2), host=outer_address()) as running:
            connections = [await running.connect() for _ in range(2)]
            for each in connections:
                for _ in range(3):
                    assert (await each.ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
                    assert (await each.ask(chat_bytes()))[0] == 200

    run(check())


def test_one_that_moved_in_beyond_the_limit_ends_with_its_answer(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(
            tmp_path, Script(), settings=Gateway(connections_per_client=2), workers=1, host=outer_address()
        ) as running:
            connections = []
            for _ in range(6):  # two at the worker, and two more at each place that these have left
                connections.append(await running.connect())
                status, fields, _ = await connections[-1].ask(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert status == 200
                assert ("close" in fields.get("connection", "")) is (len(connections) > 2)
            assert len(running.server.connections) <= 3

    run(check())


def test_workers_share_what_a_client_may_have(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(connections_per_client=5, workers=2)
        async with relay(tmp_path, Script(), settings=settings, workers=2, host=outer_address()) as running:
            connections = [await running.connect() for _ in range(40)]
            for each in connections:
                await each.send(chat_bytes())
            assert 3 <= await served(connections) <= 6

    run(check())


def test_clients_on_this_machine_have_no_limit(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(connections_per_client=1)) as running:
            connections = [await running.connect() for _ in range(5)]
            for each in connections:
                assert (await each.ask(chat_bytes()))[0] == 200

    run(check())


def test_who_is_behind_a_trusted_proxy_has_a_limit_of_requests(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            await go.wait()
            writer.write(ok_answer())

    async def check() -> None:
        settings = Gateway(connections_per_client=2, trusted_proxies=("127.0.0.1/32",))
        async with relay(tmp_path, slow, settings=settings, workers=1) as running:
            one, other = (b"X-Forwarded-For: 10.9.9.9, 192.0.2.%d\r\n" % number for number in (7, 8))
            connections = [await running.connect() for _ in range(5)]
            for each in connections[:4]:
                await each.send(chat_bytes(more=one))
            await connections[4].send(chat_bytes(more=other))
            await asyncio.sleep(0.3)
            assert running.staff is not None
            shown = await running.staff.census.requests()
            assert sorted(each.client for each in shown) == ["192.0.2.7", "192.0.2.7", "192.0.2.8"]
            go.set()
            answers = [await each.answer() for each in connections]
            codes = [json.loads(content).get("error", {}).get("code") for _, _, content in answers]
            assert sorted(codes, key=str) == [None, None, None, "too_many_requests", "too_many_requests"]
            for _ in range(3):  # one after the other is not too many
                assert (await connections[4].ask(chat_bytes(more=other)))[0] == 200

    run(check())


def test_only_trusted_proxies_are_believed(tmp_path: Path) -> None:
    async def check() -> None:
        more = b"X-Forwarded-For: 192.0.2.7\r\nForwarded: for=192.0.2.7\r\nX-Forwarded-Proto: https\r\nX-Real-IP: 192.0.2.7\r\n"
        for proxies in ((), ("10.0.0.0/8",), ("127.0.0.1/32",)):
            script = Script()
            async with relay(tmp_path, script, settings=Gateway(trusted_proxies=proxies)) as running:
                connection = await running.connect()
                for _ in range(2):
                    assert (await connection.ask(chat_bytes(more=more)))[0] == 200
            for head, _ in script.requests:
                assert (b"192.0.2.7" in head) is (b"https" in head) is (proxies == ("127.0.0.1/32",)), head

    run(check())


@pytest.mark.parametrize(
    ("values", "client"),
    [
        ([b"192.0.2.7"], "192.0.2.7"),
        ([b"192.0.2.7:4711"], "192.0.2.7"),
        ([b"evil, 192.0.2.7"], "192.0.2.7"),
        ([b"192.0.2.9, 192.0.2.7 ,\t10.0.0.3"], "192.0.2.7"),
        ([b"192.0.2.9", b"192.0.2.7, 10.0.0.3"], "192.0.2.7"),
        ([b"2001:db8::7"], "2001:db8::7"),
        ([b"[2001:db8::7]"], "2001:db8::7"),
        ([b"[2001:DB8::7%eth0]:443"], "2001:db8::7"),
        ([b"::ffff:192.0.2.7"], "192.0.2.7"),
        ([], ""),
        ([b""], ""),
        ([b"10.0.0.1, 10.0.0.2"], ""),
        ([b"192.0.2.7, unknown"], ""),
        ([b"192.0.2.7, 10.0.0.300"], ""),
        ([b"192.0.2.7 10.0.0.3"], ""),
        ([b"192.0.2.7,"], ""),
        ([b"_hidden"], ""),
        ([b"[192.0.2.7"], ""),
        ([b"1" * 10_000], ""),
        ([b"192.0.2.7, " + b"10.0.0.1, " * 40 + b"10.0.0.1"], ""),
    ],
)
def test_a_client_is_the_rightmost_address_that_is_no_proxy(values: list[bytes], client: str) -> None:
    assert forwarded_for(values, ("10.0.0.0/8", "2001:db8:1::/48")) == client


def test_proxies_are_trusted_by_their_networks() -> None:
    proxies = ("10.0.0.0/8", "2001:db8::/32")
    for host in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", "2001:db8::1%eth0"):
        assert is_trusted((host, 5), proxies)
    for peer in (("11.0.0.1", 5), ("2001:db9::1", 5, 0, 0), "", None, b"", ("", 5)):
        assert not is_trusted(peer, proxies)
    assert not is_trusted(("10.1.2.3", 5), ())


def test_clients_are_addresses_and_networks() -> None:
    assert client_of(("10.0.0.1", 5)) == client_of(("10.0.0.1", 6)) == client_of(("::ffff:10.0.0.1", 6, 0, 0)) == "10.0.0.1"
    assert client_of(("2001:db8::1", 5, 0, 0)) == client_of(("2001:db8::ffff:2", 6, 0, 0))
    assert client_of(("2001:db8:0:1::1", 5, 0, 0)) != client_of(("2001:db8::1", 5, 0, 0))
    assert client_of(("fe80::1%eth0", 5, 0, 3))
    assert client_of("") == client_of(b"") == client_of(None) == ""
    clients = Clients()
    peer = "10.0.0.1"
    assert [clients.come(number, peer, 2, fresh=True) for number in range(3)] == [True, True, False]
    clients.go(2)
    assert not clients.come(3, peer, 2, fresh=True), "a refused one had taken no place"
    assert not clients.come(4, peer, 2, fresh=False)
    for number in range(5):
        clients.go(number)
    assert [clients.come(number, peer, 1, fresh=True) for number in range(2)] == [True, False]
    for local in ("", "127.0.0.1", "127.9.9.9", client_of(("::1", 5, 0, 0)), client_of(("::ffff:127.0.0.1", 5, 0, 0))):
        assert clients.come(local, local, 0, fresh=True), "on this machine"


# Bodies.


def test_bodies_that_wait_take_no_more_together_than_they_may(tmp_path: Path) -> None:
    async def check() -> None:
        relays = relay_gateway.default_workers or 1
        settings = Gateway(max_body_bytes=_MIB, max_buffered_bytes=2 * _MIB, workers=relays)
        async with relay(tmp_path, Script(), settings=settings, ready=False) as running:
            running.lifecycle.start_s = 1.5
            clients = [await running.connect() for _ in range(12)]
            for each in clients:
                await each.send(chat_bytes(size=600_000))
            answers = [await each.answer() for each in clients]
            refused = [answer for answer in answers if answer[0] == 503]
            assert all(json.loads(content)["error"]["code"] == "too_much_buffered" for _, _, content in refused)
            assert all(fields["retry-after"] == "1" for _, fields, _ in refused)
            assert [status for status, _, _ in answers].count(200) == len(answers) - len(refused)
            most = 3 if relays == 1 else 2  # of 600,000 bytes: in 2 MiB, or in two shares of 1 MiB
            assert 1 <= len(answers) - len(refused) <= most
            await until(lambda: running.inference.held_bytes == 0)
            await in_step(running)

    run(check())


def test_one_client_cannot_take_what_bodies_may_take(tmp_path: Path) -> None:
    """Beyond a quarter it leaves a quarter to the others, whatever it sends."""

    async def check() -> None:
        settings = Gateway(max_body_bytes=_MIB, max_buffered_bytes=8 * _MIB, trusted_proxies=("127.0.0.0/8",), workers=1)
        async with relay(tmp_path, Script(), settings=settings, workers=1, ready=False) as running:
            running.lifecycle.start_s = 2.0
            greedy = [await running.connect() for _ in range(12)]
            for each in greedy:
                await each.send(chat_bytes(size=_MIB, more=b"X-Forwarded-For: 192.0.2.7\r\n"))
            await asyncio.sleep(0.3)
            modest = [await running.connect() for _ in range(2)]
            for each in modest:
                await each.send(chat_bytes(size=900_000, more=b"X-Forwarded-For: 192.0.2.8\r\n"))
            assert [(await each.answer())[0] for each in modest] == [200, 200]
            answers = [await each.answer() for each in greedy]
            assert sum(status == 200 for status, _, _ in answers) == 6
            refused = {json.loads(content)["error"]["code"] for status, _, content in answers if status != 200}
            assert refused == {"too_much_buffered"}

    run(check())


def test_a_body_that_is_answered_takes_nothing_any_more(tmp_path: Path) -> None:
    async def check() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        go = asyncio.Event()

        async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                await read_request(reader)
                writer.write(head)
                await go.wait()
                writer.write(b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")

        settings = Gateway(max_body_bytes=_MIB, max_buffered_bytes=_MIB)
        async with relay(tmp_path, stream, settings=settings) as running:
            clients = [await running.connect() for _ in range(8)]
            for each in clients:
                await each.send(chat_bytes(size=900_000, stream=True))
                assert b" 200 OK" in await each.reader.readuntil(b"\r\n\r\n")
            go.set()
            await until(lambda: running.in_flight == 0)
            assert running.inference.held_bytes == 0

    run(check())


def test_a_body_that_there_is_no_room_for_is_not_uploaded_first(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(max_body_bytes=4 * _MIB, max_buffered_bytes=4 * _MIB)
        async with relay(tmp_path, Script(), settings=settings, workers=1) as running:
            first, second = await running.connect(), await running.connect()
            large = chat_bytes(size=3 * _MIB)
            await first.send(large[: 2 * _MIB])
            await asyncio.sleep(0.3)
            await second.send(large[:1000])
            status, fields, _ = await second.answer()
            assert (status, fields["connection"]) == (503, "close")
            await first.send(large[2 * _MIB :])
            assert (await first.answer())[2] == OK
            await in_step(running)

    run(check())


def test_clients_that_leave_take_their_bodies_along(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(max_body_bytes=_MIB, max_buffered_bytes=_MIB)
        async with relay(tmp_path, Script(ok_answer()), settings=settings) as running:
            for _ in range(5):
                leaving = [await running.connect() for _ in range(4)]
                for each in leaving:
                    await each.send(chat_bytes(size=900_000)[:400_000])
                await asyncio.sleep(0.05)
                for each in leaving:
                    each.writer.transport.abort()
            await asyncio.sleep(0.2)
            connection = await running.connect()
            assert (await connection.ask(chat_bytes(size=900_000)))[2] == OK
            assert running.inference.held_bytes == 0

    run(check())
