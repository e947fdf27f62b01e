"""Raw TCP ports: the real server, dispatcher and scheduler, between real sockets."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from relay_gateway import Engine, Running, engine, gateway, outer_address, run, until

from mmd.config import Gateway, Timeouts
from mmd.gateway.tunnel import Patience
from mmd.gateway.tunnel_server import TunnelServer
from mmd.names import CPU, UnitName
from mmd.policy.events import Observed, Phase

MIB = 1 << 20
UNIT = UnitName("m", CPU)
WORKERS = pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])


@dataclass
class Port:
    running: Running
    server: TunnelServer
    address: tuple[str, int]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address, limit=1 << 16)


@asynccontextmanager
async def tunnelling(
    path: Path,
    serve: Engine,
    *,
    ready: bool = True,
    workers: int = 0,
    patience: Patience | None = None,
    settings: Gateway | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Port]:
    async with (
        engine(path / "engine.sock", serve) as endpoint,
        gateway({"m": endpoint}, ready=ready, workers=workers, settings=settings) as running,
    ):
        listening = socket.create_server((host, 0))
        server = TunnelServer("mmd-port-m", running.dispatcher, listening, "m", patience=patience)
        await server.start()
        try:
            yield Port(running, server, listening.getsockname())
        finally:
            await server.stop_accepting()
            await server.drain(0)
            await until(lambda: not server.connections)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.write_eof()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


def reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def scenario(path: Path, serve: Engine, body: Callable[[Port], Awaitable[None]], **options: object) -> None:
    async def work() -> None:
        async with tunnelling(path, serve, **options) as port, asyncio.timeout(20):  # type: ignore[arg-type]
            await body(port)

    run(work())


@WORKERS
def test_bytes_go_both_ways_untouched_and_ends_are_passed_on(tmp_path: Path, workers: int) -> None:
    async def body(port: Port) -> None:
        sent = os.urandom(8 * MIB)
        reader, writer = await port.connect()

        async def send() -> None:
            for begin in range(0, len(sent), 100_000):
                writer.write(sent[begin : begin + 100_000])
                await writer.drain()
            writer.write_eof()  # the engine answers on

        sending = asyncio.create_task(send())
        received = await reader.read(-1)
        await sending
        assert received == sent
        assert port.running.in_flight == 0 or port.server.connections
        writer.close()
        await until(lambda: not port.server.connections and port.running.in_flight == 0)

    scenario(tmp_path, echo, body, workers=workers)


def test_the_engine_ends_first_and_the_client_may_go_on(tmp_path: Path) -> None:
    heard = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.write_eof()
        heard.extend(await reader.read(-1))

    async def body(port: Port) -> None:
        reader, writer = await port.connect()
        assert await reader.read(-1) == b"hello"
        writer.write(b"x" * MIB)
        await writer.drain()
        writer.write_eof()
        await until(lambda: len(heard) == MIB and not port.server.connections)
        writer.close()

    scenario(tmp_path, greet, body)


def test_a_client_that_does_not_read_holds_the_engine_up(tmp_path: Path) -> None:
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        for _ in range(256):
            writer.write(bytes(MIB // 4))
            await writer.drain()
            written += MIB // 4
        writer.write_eof()

    async def body(port: Port) -> None:
        reader, writer = await port.connect()
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.3)
        assert 0 < written < 24 * MIB, "kernel buffers of two connections, and a little here"
        taken = 0
        while piece := await reader.read(1 << 16):
            taken += len(piece)
        assert taken == 64 * MIB
        writer.close()

    scenario(tmp_path, flood, body)


def test_an_engine_that_does_not_read_holds_the_client_up(tmp_path: Path) -> None:
    async def body(port: Port) -> None:
        _, writer = await port.connect()
        sent = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                while sent < 64 * MIB:
                    writer.write(bytes(MIB // 4))
                    await writer.drain()
                    sent += MIB // 4
        assert 0 < sent < 24 * MIB
        reset(writer)

    scenario(tmp_path, hang, body)


@pytest.mark.parametrize("reads", ["client", "engine"])
def test_who_reads_nothing_of_what_waits_for_it_is_cut_off(tmp_path: Path, reads: str) -> None:
    """Also of less than stops the other side from writing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reads == "client":  # fills the kernel's buffers, and leaves some of it to the gateway
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(20)
        writer.write(b"x" * (16 << 20))
        await reader.read()

    async def body(port: Port) -> None:
        _, writer = await port.connect()
        if reads == "engine":
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"hello")
        else:
            writer.write(b"x" * (16 << 20))
        await until(lambda: port.server.connections)
        await until(lambda: not port.server.connections)
        writer.transport.abort()

    settings = Gateway(timeouts=Timeouts(stalled_s=0.5))
    scenario(tmp_path, serve, body, settings=settings)


def test_a_reset_by_either_side_reaches_the_other(tmp_path: Path) -> None:
    ends: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        word = await reader.readexactly(1)
        writer.write(word)
        if word == b"r":
            await reader.read(1)  # what the client sends next, unread in part, makes the close a reset
            writer.transport.abort()
            return
        try:
            ends.append("end" if await reader.read(-1) == b"" else "more")
        except ConnectionResetError:
            ends.append("reset")

    async def body(port: Port) -> None:
        _, writer = await port.connect()
        writer.write(b"c")
        await until(lambda: port.running.in_flight == 1)
        await asyncio.sleep(0.1)
        reset(writer)
        await until(lambda: ends and not port.server.connections)
        reader, writer = await port.connect()
        writer.write(b"r")
        assert await reader.readexactly(1) == b"r"
        writer.write(bytes(MIB))
        with pytest.raises(ConnectionError):  # noqa: PT012 - whichever notices first
            while await reader.read(1):
                pass
            for _ in range(50):
                writer.write(b"more")
                await writer.drain()
                await asyncio.sleep(0.05)
        await until(lambda: not port.server.connections and port.running.in_flight == 0)

    scenario(tmp_path, serve, body)


@WORKERS
def test_a_connection_starts_the_model_and_waits_for_it(tmp_path: Path, workers: int) -> None:
    async def body(port: Port) -> None:
        port.running.lifecycle.start_s = 0.4
        begun = asyncio.get_running_loop().time()
        reader, writer = await port.connect()
        writer.write(b"early")
        writer.write_eof()
        await until(lambda: port.running.dispatcher.scheduler.state.waiting)
        assert await reader.read(-1) == b"early"
        assert asyncio.get_running_loop().time() - begun > 0.35
        assert [type(action).__name__ for action in port.running.lifecycle.actions] == ["Start"]
        writer.close()

    scenario(tmp_path, echo, body, ready=False, workers=workers)


def test_a_client_that_goes_away_while_the_model_loads_costs_nothing(tmp_path: Path) -> None:
    async def body(port: Port) -> None:
        port.running.lifecycle.start_s = 0.5
        _, writer = await port.connect()
        await until(lambda: port.running.dispatcher.scheduler.state.waiting)
        writer.close()
        await until(lambda: not port.running.dispatcher.scheduler.state.waiting and not port.server.connections)
        _, talker = await port.connect()
        talker.write(b"something to say")
        await until(lambda: port.running.dispatcher.scheduler.state.waiting)
        await asyncio.sleep(0.1)
        assert port.server.connections
        reset(talker)
        await until(lambda: not port.server.connections)

    scenario(tmp_path, echo, body, ready=False)


def test_nobody_at_the_engine_is_a_reset_with_a_word_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(port: Port) -> None:
        port.running.lifecycle.endpoints["m"] = f"unix:{tmp_path}/nobody"
        reader, writer = await port.connect()
        writer.write(b"hello")
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        await until(lambda: not port.server.connections and port.running.in_flight == 0)
        writer.close()
        assert "a connection to the port of m is closed: nobody answers at its engine" in caplog.text
        assert "Stop" in [type(action).__name__ for action in port.running.lifecycle.actions], "it was restarted once"

    scenario(tmp_path, echo, body)


@WORKERS
def test_a_silent_connection_holds_nobody_up_and_is_in_use_when_it_speaks(tmp_path: Path, workers: int) -> None:
    async def body(port: Port) -> None:
        reader, writer = await port.connect()
        for word in (b"one", b"two", b"three"):
            writer.write(word)
            assert await reader.readexactly(len(word)) == word
            assert port.running.in_flight == 1
            await until(lambda: port.running.in_flight == 0)
            assert port.server.connections
        writer.write_eof()
        assert await reader.read(-1) == b""
        writer.close()

    scenario(tmp_path, echo, body, workers=workers, patience=Patience(0.1, 30))


def test_an_engine_that_owes_an_answer_is_in_use_for_longer(tmp_path: Path) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        await asyncio.sleep(0.6)
        writer.write(b"answer")
        await asyncio.sleep(60)

    async def body(port: Port) -> None:
        reader, writer = await port.connect()
        writer.write(b"?")
        for _ in range(8):
            await asyncio.sleep(0.05)
            assert port.running.in_flight == 1
        assert await reader.readexactly(6) == b"answer"
        await until(lambda: port.running.in_flight == 0)
        writer.close()

    scenario(tmp_path, slow, body, patience=Patience(0.1, 5))


def test_the_engine_that_speaks_first_after_a_silence_waits_for_its_admission(tmp_path: Path) -> None:
    speak = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await speak.wait()
        writer.write(b"again")
        writer.write_eof()
        await reader.read(-1)

    async def body(port: Port) -> None:
        reader, writer = await port.connect()
        assert await reader.readexactly(5) == b"hello"
        await until(lambda: port.running.in_flight == 0)
        port.running.dispatcher.post(Observed(UNIT, Phase.SLEEPING, 1))
        speak.set()
        assert await reader.read(-1) == b"again"
        assert [type(action).__name__ for action in port.running.lifecycle.actions] == ["Wake"]
        writer.close()
        await until(lambda: not port.server.connections)

    scenario(tmp_path, serve, body, patience=Patience(0.1, 0.1))


def test_leaving_moves_who_waits_and_keeps_who_talks(tmp_path: Path) -> None:
    async def body(port: Port) -> None:
        moved: list[int] = []
        port.running.dispatcher.post(Observed(UNIT, Phase.READY))
        reader, writer = await port.connect()
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        port.running.dispatcher.post(Observed(UNIT, Phase.STOPPING))
        waiting_reader, waiting_writer = await port.connect()
        waiting_writer.write(b"waits")
        await until(lambda: len(port.running.dispatcher.scheduler.state.waiting) == 1)
        port.server.hand_over(lambda connection, read, chunked, let_in: moved.append(connection))
        (descriptor,) = moved
        port.running.dispatcher.retire()
        assert len(port.server.connections) == 1
        with socket.socket(fileno=descriptor) as other:
            assert other.recv(100) == b"waits", "nothing was read of it"
            other.sendall(b"from the next one")
        assert await waiting_reader.read(-1) == b"from the next one"
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
        with pytest.raises(ConnectionRefusedError):
            await port.connect()
        await until(lambda: port.running.in_flight == 0)
        writer.write(b"and after a silence")
        assert await reader.readexactly(19) == b"and after a silence"
        assert port.running.in_flight == 1, "the next one hears of it"
        for each in (writer, waiting_writer):
            each.close()
        await until(lambda: not port.server.connections)

    scenario(tmp_path, echo, body, ready=False, patience=Patience(0.2, 0.2))


def test_stopping_waits_for_those_in_use_only(tmp_path: Path) -> None:
    async def body(port: Port) -> None:
        silent = await port.connect()
        silent[1].write(b"s")
        assert await silent[0].readexactly(1) == b"s"
        await until(lambda: port.running.in_flight == 0)
        talking = await port.connect()
        talking[1].write(b"t")
        assert await talking[0].readexactly(1) == b"t"
        await port.server.stop_accepting()
        begun = asyncio.get_running_loop().time()
        await port.server.drain(10)
        assert asyncio.get_running_loop().time() - begun < 5
        for reader, writer in (silent, talking):
            with suppress(ConnectionResetError):
                assert await reader.read(-1) == b""
            writer.close()

    scenario(tmp_path, echo, body, patience=Patience(0.3, 0.3))


def test_a_client_has_no_more_connections_than_it_may(tmp_path: Path) -> None:
    async def body(port: Port) -> None:
        first, second = await port.connect(), await port.connect()
        for reader, writer in (first, second):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
        with pytest.raises(ConnectionResetError):
            await (await port.connect())[0].read()
        assert len(port.server.connections) == port.running.in_flight == 2
        moved, theirs = socket.socketpair()
        with theirs:
            await port.server.adopt(moved, b"", None)
            assert len(port.server.connections) == 3, "a Unix socket's, and one that was let in before"
        second[1].close()
        await until(lambda: len(port.server.connections) == 1)
        reader, writer = await port.connect()
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        for _, each in (first, (reader, writer)):
            each.close()

    scenario(tmp_path, echo, body, settings=Gateway(connections_per_client=2), host=outer_address())
