"""Answers that engines keep: found by their id whichever process has seen it first, and after an upgrade or a crash."""

import asyncio
import contextlib
import json
import socket
import sqlite3
import time
from pathlib import Path

import pytest
import uvloop
from relay_gateway import Connection, Running, chat_bytes, ok_answer, read_request, relay, run, until

from mmd.gateway.answer_book import AnswerBook
from mmd.gateway.channel import Channel
from mmd.gateway.handover import KeysTaken, Predecessor, Successor
from mmd.gateway.relay.kept import KEPT_MAX, KeptAnswers, with_owner
from mmd.gateway.relay.visitor import Visitor
from mmd.keys import Key, KeyScope, digest
from mmd.names import CPU, UnitName
from mmd.policy.events import Observed, Phase


class Keeper:
    """An engine that keeps its answers, the ids of which count."""

    def __init__(self) -> None:
        self.count = 0
        self.asked: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_head(reader)
            if head.startswith(b"POST"):
                self.count += 1
                writer.write(ok_answer(b'{"id": "resp_%d", "object": "response"}' % self.count))
            else:
                self.asked.append(head.split()[1])
                writer.write(ok_answer(b'{"found": true}'))
            await writer.drain()


async def read_head(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One request, which need not have a body."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head, await reader.readexactly(int(lines[0].split(b":")[1]) if lines else 0)


def create(model: str = "m") -> bytes:
    return chat_bytes(model).replace(b"/v1/chat/completions", b"/v1/responses")


def ask(answer: str) -> bytes:
    return f"GET /v1/responses/{answer} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def made(connection: Connection) -> str:
    status, _, content = await connection.ask(create())
    assert status == 200
    return str(json.loads(content)["id"])


async def find(connection: Connection, answer: str) -> int:
    return (await connection.ask(ask(answer)))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_answer_is_found_at_once_from_any_connection(tmp_path: Path, workers: int) -> None:
    """A hundred times, since processes race here: one has seen the id, another one is asked for it."""

    async def check() -> None:
        async with relay(tmp_path, Keeper(), workers=workers) as running:
            old = [await running.connect() for _ in range(6)]
            for each in old[:3]:
                assert await find(each, "resp_none") == 404, "so it is the deciding process that reads it from now on"
            for turn in range(100):
                answer = await made(old[3 + turn % 3])
                asking = (old[turn % 3], await running.connect() if turn % 4 == 0 else old[3 + (turn + 1) % 3])
                assert await asyncio.gather(*(find(each, answer) for each in asking)) == [200, 200], turn

    run(check())


def test_an_id_that_is_on_its_way_is_waited_for(tmp_path: Path) -> None:
    async def check() -> None:
        keeper = Keeper()
        async with relay(tmp_path, keeper, workers=0) as running:
            kept, connection = running.dispatcher.kept(), await running.connect()
            begun = time.monotonic()
            assert await find(connection, "resp_a") == 404
            assert time.monotonic() - begun < 0.3, "there is nobody to wait for"
            kept.others = 1
            for target in ("resp_a", "resp_a/cancel?x=y"):
                asking = asyncio.ensure_future(
                    connection.ask(ask(target).replace(b"GET", b"POST" if "cancel" in target else b"GET"))
                )
                await asyncio.sleep(0.1)
                assert asking.done() is ("cancel" in target)
                kept.add("resp_a", "m")
                assert (await asking)[0] == 200
            assert keeper.asked == [b"/v1/responses/resp_a"]
            begun = time.monotonic()
            assert await find(connection, "resp_b") == 404
            assert 0.4 < time.monotonic() - begun < 2
            await connection.send(ask("resp_c"))
            await asyncio.sleep(0.05)
            await connection.close()
            await until(lambda: not running.server.connections)

    run(check())


def test_an_engine_is_not_started_to_be_asked_for_what_went_with_the_one_before(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Keeper(), workers=0) as running:
            connection = await running.connect()
            answer = await made(connection)
            unit = UnitName("m", CPU)
            running.dispatcher.post(Observed(unit, Phase.STOPPED))
            assert await find(connection, answer) == 404
            assert not running.lifecycle.actions
            running.dispatcher.post(Observed(unit, Phase.READY))
            assert await find(connection, answer) == 200, "its engine knows best"

    run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_an_id_is_known_before_the_client_sees_it(tmp_path: Path, stream: bool) -> None:
    """Wherever the answer is cut on its way from the engine."""

    async def check() -> None:
        seen: list[bool] = []
        event = b'data: {"response": {"id": "resp_77", "object": "response"}}\n\n'
        for cut in (20, 33, 36, 40, 60):

            async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: int = cut) -> None:
                await read_request(reader)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event))
                for piece in (event[:cut], event[cut:]):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02)

            async with relay(tmp_path, engine, workers=0) as running:
                connection = await running.connect()
                await connection.send(create() if not stream else create().replace(b"false", b"true "))
                async with asyncio.timeout(5):
                    await connection.reader.readuntil(b'resp_77"')
                seen.append(known(running))
        assert seen == [True] * 5

    run(check())


def known(running: Running) -> bool:
    return running.dispatcher.kept().find("resp_77") == "m"


# An upgrade.


def test_the_next_gateway_is_told_before_it_decides_and_of_what_comes_later() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        successor = Successor(lambda: None)
        successor._channel = Channel(ours, None, lambda *_: None, lambda: None)
        predecessor = Predecessor(theirs)
        heard: list[object] = []
        predecessor.on_kept = heard.append
        predecessor.on_kept_late = lambda *late: heard.append(late)
        predecessor.taken.add_done_callback(lambda _: heard.append("taken"))
        many = [(f"resp_{number:0>100}", "org/model") for number in range(KEPT_MAX)]
        successor.keep(many)
        successor.take({}, KeysTaken("", (), {}))
        await predecessor.taken
        successor.keep_late("resp_late", "m")
        await until(lambda: len(heard) == 3)
        assert heard == [many, "taken", ("resp_late", "m")]
        predecessor.close()
        successor.dismiss()

    uvloop.run(main())


# The book.


def test_answers_outlive_the_gateway(tmp_path: Path) -> None:
    async def main() -> None:
        book = AnswerBook(tmp_path / "answers.sqlite")
        assert book.load() == []
        for number in range(100):
            book.note(f"resp_{number}", "m")
        assert book.load() == [], "nothing is written for every request"
        await asyncio.sleep(1.3)
        other = AnswerBook(tmp_path / "answers.sqlite")
        assert other.load() == [(f"resp_{number}", "m") for number in range(100)], "a crash now loses nothing"
        other.close()
        book.note("resp_0", "n")
        book.close()
        book.close()
        book = AnswerBook(tmp_path / "answers.sqlite")
        assert book.load()[-2:] == [("resp_99", "m"), ("resp_0", "n")], "the end of the gateway writes what is left"
        book.close()

    asyncio.run(main())


def test_the_book_holds_no_more_answers_than_the_gateway(tmp_path: Path) -> None:
    async def main() -> None:
        book = AnswerBook(tmp_path / "answers.sqlite")
        for start in range(0, 3 * KEPT_MAX, KEPT_MAX // 2):
            for number in range(start, start + KEPT_MAX // 2):
                book.note(f"resp_{number}", "m")
            begun = time.monotonic()
            book.write()
            assert time.monotonic() - begun < 0.5
        assert [answer for answer, _ in book.load()] == [f"resp_{number}" for number in range(2 * KEPT_MAX, 3 * KEPT_MAX)]
        book.close()

    asyncio.run(main())


def test_a_book_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        (tmp_path / "answers.sqlite").write_bytes(b"this is no database " * 100)
        for file in (tmp_path / "answers.sqlite", tmp_path / "missing" / "answers.sqlite"):
            book = AnswerBook(file)
            assert book.load() == []
            book.note("resp_1", "m")
            book.write()
            book.close()

    asyncio.run(main())
    assert caplog.text.count("which engine keeps which answer is not kept") == 2


def test_answers_that_an_earlier_version_wrote_down_have_no_owner(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as database:  # as 0.1.0 made it
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA user_version = 1")
        database.execute("CREATE TABLE answer (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, model TEXT NOT NULL)")
        database.execute("REPLACE INTO answer (id, model) VALUES ('resp_old', 'demo/m')")

    async def main() -> None:
        book, kept = AnswerBook(file), KeptAnswers()
        kept.inherit(book.load())
        assert (kept.find("resp_old"), kept.owner("resp_old")) == ("demo/m", "")
        use, boss = (Visitor(Key(scope.value, digest(scope.encode()), scope=scope)) for scope in (KeyScope.USE, KeyScope.ADMIN))
        assert not use.owns(kept.owner("resp_old"))
        assert boss.owns(kept.owner("resp_old"))
        book.note("resp_new", with_owner("demo/m", use.owner))
        book.close()
        book, kept = AnswerBook(file), KeptAnswers()
        kept.inherit(book.load())
        assert (kept.owner("resp_old"), kept.owner("resp_new")) == ("", use.owner)
        assert use.owns(kept.owner("resp_new"))
        book.close()

    asyncio.run(main())
