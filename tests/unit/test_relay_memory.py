"""What clients that are slow, idle or greedy cost: measured in a process that does nothing but relay."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from relay_gateway import Connection, Engine, Running, Script, chat_bytes, in_step, ok_answer, read_request, relay, run, until

from mmd.config import Gateway

_KIB = 1 << 10
_MIB = 1 << 20


def used(running: Running) -> int:
    """Bytes of memory that the relaying process has for itself."""
    assert running.staff is not None
    text = Path(f"/proc/{running.staff.pids[0]}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found[1]) * _KIB


@asynccontextmanager
async def measured(
    path: Path, serve: Engine, settings: Gateway | None = None
) -> AsyncIterator[tuple[Running, Callable[[], int]]]:
    """A gateway with one worker that has warmed up, and a function that says by how many bytes it has grown."""
    async with relay(path, serve, settings=settings, workers=1) as running:
        connection = await running.connect()
        for _ in range(50):
            assert (await connection.ask(chat_bytes("nobody")))[0] == 404
        before = used(running)
        yield running, lambda: used(running) - before


async def many(running: Running, count: int) -> list[Connection]:
    return [await running.connect() for _ in range(count)]


def test_idle_connections_cost_next_to_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with measured(tmp_path, Script()) as (running, growth):
            clients = await many(running, 400)
            for each in clients[:200]:  # half of them have asked before
                assert (await each.ask(chat_bytes()))[0] == 200
            await asyncio.sleep(0.2)
            assert growth() < 400 * 10 * _KIB
            await in_step(running)

    run(check())


def test_heads_that_do_not_end_cost_what_heads_may_have(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(max_head_bytes=16 * _KIB)
        async with measured(tmp_path, Script(), settings) as (running, growth):
            fields = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 90) for number in range(140))
            begun = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + fields
            clients = await many(running, 200)
            for each in clients:
                for at in range(0, len(begun), 4000):
                    await each.send(begun[at : at + 4000])
            await asyncio.sleep(0.3)
            # The head is kept as it came, for the process that may have to go on with it, and as the fields that it has so far.
            assert growth() < 200 * 5 * 16 * _KIB
            await in_step(running)

    run(check())


def test_bodies_that_do_not_end_cost_what_bodies_may_take_together(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(max_body_bytes=2 * _MIB, max_buffered_bytes=16 * _MIB, workers=1)
        async with measured(tmp_path, Script(), settings) as (running, growth):
            request = chat_bytes(size=2 * _MIB - 10)
            clients = await many(running, 60)
            for each in clients:  # 120 MiB, all but the last byte of each
                each.writer.write(request[:-1])
            refused = 0
            for each in clients:
                try:
                    async with asyncio.timeout(0.2):
                        refused += b" 503 " in await each.reader.readuntil(b"\r\n")
                except TimeoutError:
                    pass
            assert refused >= 50
            assert growth() < 32 * _MIB
            for each in clients:
                each.writer.transport.abort()
            await in_step(running)

    run(check())


def test_who_asks_again_and_again_without_reading_waits(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script(*([ok_answer(b"x" * 20_000)] * 10_000))
        async with measured(tmp_path, script) as (running, growth):
            clients = await many(running, 10)
            for each in clients:
                each.writer.transport.pause_reading()  # type: ignore[attr-defined]
                each.writer.write(chat_bytes() * 20_000)
            asked = -1
            while asked != len(script.requests):
                asked = len(script.requests)
                await asyncio.sleep(0.5)
            assert asked < 10 * 1000, "the others are not even read"
            assert growth() < 10 * _MIB
            behaves = await running.connect()
            assert (await behaves.ask(chat_bytes()))[0] == 200, "others are served meanwhile"

    run(check())


def test_answers_that_are_not_read_stay_at_the_engine(tmp_path: Path) -> None:
    async def check() -> None:
        written = 0

        async def large(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (32 * _MIB))
            for _ in range(32):
                writer.write(b"x" * _MIB)
                await writer.drain()
                written += _MIB

        async with measured(tmp_path, large) as (running, growth):
            clients = await many(running, 20)
            for each in clients:
                each.writer.transport.pause_reading()  # type: ignore[attr-defined]
                await each.send(chat_bytes())
            before = -1
            while before != written:
                before = written
                await asyncio.sleep(0.5)
            assert growth() < 20 * _MIB
            for each in clients:
                each.writer.transport.abort()
            await until(lambda: running.in_flight == 0)

    run(check())
