"""More clients than there are descriptors: they wait in the kernel, the others are served, and no engine is touched."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from relay_gateway import OK, Connection, Engine, Script, chat_bytes, engine, ok_answer, read_request, run

from mmd.gateway.places import Places, places
from mmd.gateway.relay.clients import Whose

_DESCRIPTORS = 200
_CEILING = (_DESCRIPTORS - 48) // 2
_HERE = Path(__file__).parent


class Limited:
    """The gateway of limited_gateway.py."""

    def __init__(self, port: int, pids: list[int]) -> None:
        self.port = port
        self.pids = pids
        self.clients: list[Connection] = []

    async def connect(self) -> Connection:
        self.clients.append(Connection(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.clients[-1]

    def cpu_s(self) -> float:
        """CPU time that it has used, proc_pid_stat(5)."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        """Of the process that has most."""
        return max(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)


@asynccontextmanager
async def limited(path: Path, kind: str, serve: Engine) -> AsyncIterator[Limited]:
    """It must not have failed to accept, nor have done anything to an engine."""
    async with engine(path / "engine.sock", serve):
        command = (sys.executable, str(_HERE / "limited_gateway.py"), kind, str(_DESCRIPTORS), str(path / "engine.sock"))
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        found = Limited(told["port"], [process.pid, *told["workers"]])
        try:
            yield found
        finally:
            for client in found.clients:
                client.writer.transport.abort()
            out, errors = await process.communicate(b"\n")
        assert json.loads(out) == {"actions": []}
        assert b"ERROR" not in errors, errors.decode()
        assert b"Too many open files" not in errors
        assert b"idle ones are closed" in errors


@pytest.mark.parametrize("kind", ["http", "workers"])
def test_idle_connections_make_room_for_others(tmp_path: Path, kind: str) -> None:
    async def check() -> None:
        async with limited(tmp_path, kind, Script()) as found:
            busy = await found.connect()
            assert (await busy.ask(chat_bytes()))[2] == OK
            for _ in range(3 * _CEILING):
                await found.connect()
            late = await found.connect()
            await late.send(chat_bytes())
            waited = asyncio.ensure_future(late.reader.readuntil(b"\r\n\r\n"))
            async with asyncio.timeout(20):
                while not waited.done():
                    assert (await busy.ask(chat_bytes()))[2] == OK, "who is connected is served all the time"
                    assert found.descriptors() < _DESCRIPTORS - 20
                    await asyncio.sleep(0.05)
            assert b" 200 OK" in waited.result()

    run(check())


@pytest.mark.parametrize("kind", ["http", "workers"])
def test_who_finds_all_places_in_use_waits_and_costs_nothing(tmp_path: Path, kind: str) -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            await go.wait()
            writer.write(ok_answer())

    async def check() -> None:
        async with limited(tmp_path, kind, slow) as found:
            clients = [await found.connect() for _ in range(_CEILING + 40)]
            for each in clients:
                await each.send(chat_bytes())
            await asyncio.sleep(0.5)
            before = found.cpu_s()
            await asyncio.sleep(2)
            assert found.cpu_s() - before < 0.4, "it does not ask again and again"
            assert _CEILING < found.descriptors() < _DESCRIPTORS
            go.set()
            answers = [await each.answer() for each in clients]
            assert {status for status, _, _ in answers} == {200}

    run(check())


def test_a_raw_port_stops_accepting_as_well(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)

    async def check() -> None:
        async with limited(tmp_path, "tunnel", echo) as found:
            clients = [await found.connect() for _ in range(_CEILING + 20)]
            for each in clients:
                await each.send(b"hello")
            async with asyncio.timeout(5):
                for each in clients[: _CEILING - 10]:
                    assert await each.reader.readexactly(5) == b"hello"
            before = found.cpu_s()
            await asyncio.sleep(1)
            assert found.cpu_s() - before < 0.3
            assert found.descriptors() < _DESCRIPTORS
            for each in clients[:40]:
                await each.close()
            async with asyncio.timeout(5):
                for each in clients[_CEILING:]:
                    assert await each.reader.readexactly(5) == b"hello"

    run(check())


class _Connection:
    def __init__(self, client: str, idle_since: float | None) -> None:
        self.whose = Whose()
        self.whose.client = client
        self.idle_since = idle_since
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class _Holder:
    def __init__(self, connections: list[_Connection]) -> None:
        self.connections = connections
        self.accepting = True

    def pause_accepting(self) -> None:
        self.accepting = False

    def resume_accepting(self) -> None:
        self.accepting = True


def test_the_client_with_most_connections_loses_those_idle_longest() -> None:
    async def check() -> None:
        few = [_Connection("few", 0.0) for _ in range(5)]
        used = [_Connection("many", None) for _ in range(20)]
        many = [_Connection("many", float(number)) for number in range(51)]
        holder = _Holder([*few, *used, *many])

        def state() -> str:
            return "accepting" if holder.accepting else "paused"

        found = Places(asyncio.get_running_loop(), 200)
        found.join(holder)
        for _ in holder.connections:
            found.come()
        assert found.full
        assert state() == "paused"
        await asyncio.sleep(0.35)
        gone = [each for each in many if each.aborted]
        assert gone == many[: len(gone)], "the oldest"
        assert len(gone) == 19
        assert not any(each.aborted for each in (*few, *used))
        for _ in gone[1:]:
            found.go()
        assert state() == "paused", "not at the first place that is free"
        found.go()
        assert state() == "accepting"
        assert places() is places()

    run(check())
