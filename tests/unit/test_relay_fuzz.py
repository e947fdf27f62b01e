"""Clients that send whatever they like: what reaches an engine is what a strict reader finds in it, every byte that comes back
belongs to an answer, and whoever else is connected notices nothing.

A failure prints the seed; MMD_FUZZ_SEED=... repeats it, MMD_FUZZ_ATTACKS=... makes a longer run (`tests/run --fuzz`).
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections import Counter
from pathlib import Path
from random import Random

import h11
import pytest
from attacks import Attack, Ending, Request, attack, read_answers, read_requests
from relay_gateway import OK, Running, Script, chat_bytes, engine, gateway, in_step, run, until

_SEED = int(os.environ.get("MMD_FUZZ_SEED", "1"))
_ATTACKS = int(os.environ.get("MMD_FUZZ_ATTACKS", "500"))
_LANES = 8
_SILENCE_S = 0.04
_PIECE_S = 0.001
_ANSWERED = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'


class _Engine:
    """Reads as strictly as h11 does, and remembers what came."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.broken: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rest = b""
        while True:
            server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            if rest:  # without any, it would take it for the end
                server.receive_data(rest)
            request = await self._read(server, reader)
            if request is None:
                return
            self.seen.append(request)
            rest = server.trailing_data[0]
            content = b"" if request.method == b"HEAD" else _ANSWERED
            fields = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(_ANSWERED)
            writer.write(b"HTTP/1.1 200 OK\r\n" + fields + content)
            await writer.drain()

    async def _read(self, server: h11.Connection, reader: asyncio.StreamReader) -> Request | None:
        head, body = None, b""
        try:
            while not isinstance(event := server.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    data = await reader.read(1 << 16)
                    if not data:
                        return None
                    server.receive_data(data)
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return None
        except h11.RemoteProtocolError as error:
            self.broken.append(str(error))
            return None
        assert head is not None
        return Request(head.method, head.target, body)


async def _send(running: Running, this: Attack) -> bytes:
    """Carry it out; what came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    came = b""
    with contextlib.suppress(OSError, RuntimeError):  # uvloop: of a transport that the gateway has closed
        for piece in this.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(_PIECE_S if len(this.pieces) > 1 else 0)
        if this.ending is Ending.FINISH:
            writer.write_eof()
        if this.ending in (Ending.WAIT, Ending.FINISH):
            came = await _listen(reader)
        if this.ending is Ending.RESET:
            handle = writer.get_extra_info("socket")
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return came


async def _listen(reader: asyncio.StreamReader) -> bytes:
    """Until the gateway closes, or has nothing more to say."""
    came = b""
    with contextlib.suppress(TimeoutError):
        while data := await asyncio.wait_for(reader.read(1 << 16), _SILENCE_S):
            came += data
    return came


def _at_engine(request: Request) -> Request:
    """As an engine gets it: of http://host/path it sees the path, and of /upstream/MODEL/path as well."""
    target = request.target.removeprefix(b"http://x")
    if target.startswith(b"/upstream/"):
        target = b"/" + target[len(b"/upstream/") :].partition(b"/")[2]
    return request._replace(target=target)


async def _lane(running: Running, served: _Engine, number: int, attacks: int) -> None:
    """Attack one model, one connection at a time. What its engine gets must be among what a strict reader finds in what was
    sent, once; it may come late, when the client has left."""
    random, unseen = Random(_SEED * 1000 + number), Counter[Request]()
    for _ in range(attacks):
        this = attack(random, f"m{number}")
        meant = read_requests(this.data)
        unseen.update(map(_at_engine, meant))
        came = await _send(running, this)
        try:
            unseen.subtract(served.seen)
            assert [request for request in served.seen if unseen[request] < 0] == []
            assert not any(b"sleep" in request.target or b"collective" in request.target for request in served.seen)
            assert served.broken == []
            statuses = read_answers(came, [request.method for request in meant])
            assert len(statuses) <= len(meant) + 1
            assert not {500, 502} & set(statuses)
        except (AssertionError, ValueError) as error:
            raise AssertionError(
                f"{error}\nseed {_SEED}, lane {number}\nsent: {this}\nmeant: {meant}\ncame: {came!r}"
            ) from error
        served.seen.clear()


async def _well_behaved(running: Running, stop: asyncio.Event) -> int:
    """Somebody else's connection; how many answers it got, each its own."""
    connection, count = await running.connect(), 0
    while not stop.is_set():
        status, _, content = await connection.ask(chat_bytes())
        assert (status, content) == (200, OK)
        count += 1
        await asyncio.sleep(0.01)
    return count


@pytest.mark.timeout(60 + _ATTACKS // 10)
@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])
def test_whatever_clients_send(tmp_path: Path, workers: int) -> None:
    async def check() -> None:
        engines = {f"m{number}": _Engine() for number in range(_LANES)}
        endpoints: dict[str, str] = {}
        async with contextlib.AsyncExitStack() as stack:
            for name, each in engines.items():
                endpoints[name] = await stack.enter_async_context(engine(tmp_path / name, each))
            endpoints["m"] = await stack.enter_async_context(engine(tmp_path / "m", Script()))
            running = await stack.enter_async_context(gateway(endpoints, workers=workers))
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(_well_behaved(running, stop)) for _ in range(4)]
                async with asyncio.TaskGroup() as attackers:
                    for number in range(_LANES):
                        attackers.create_task(_lane(running, engines[f"m{number}"], number, _ATTACKS // _LANES))
                stop.set()
            assert all(task.result() > 10 for task in others)
            await until(lambda: running.in_flight == 0)
            await in_step(running)

    run(check())
