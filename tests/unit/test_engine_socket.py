"""Who is believed to be an engine: real sockets, links, FIFOs and other users (root only, where another user is needed)."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import uvloop

from mmd.engines.base import HttpCall
from mmd.gateway.engine_client import EngineClient, EngineError
from mmd.gateway.engine_socket import (
    UNKNOWN_ENDPOINT,
    EngineAddress,
    EngineGoneError,
    EngineUnavailableError,
    port_endpoint,
    socket_endpoint,
)
from mmd.gateway.listener_owner import ForeignListenerError, check_owner

EVE = 64_321
"""A uid that nobody else has."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's processes need root")


class Opened(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class


async def connect(endpoint: str) -> None:
    (await EngineAddress(endpoint).connect(Opened)).transport.abort()
    await asyncio.sleep(0.01)  # uvloop closes in its next turns


def reached(endpoint: str) -> None:
    uvloop.run(connect(endpoint))
    asyncio.run(connect(endpoint))


def gone(endpoint: str) -> None:
    for run in (uvloop.run, asyncio.run):
        with pytest.raises(EngineGoneError):
            run(connect(endpoint))


@contextmanager
def listening(path: Path, backlog: int = 8) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@contextmanager
def as_user(uid: int, work: Callable[[], object]) -> Iterator[None]:
    """`work` done by a process of another user, which then lives as long as this."""
    done, said = os.pipe()
    end, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            kept = work()
            os.write(said, b"1")
            os.read(end, 1)
            del kept
        finally:
            os._exit(0)
    os.close(said)
    os.close(end)
    try:
        assert os.read(done, 1) == b"1", "the other user could not do it"
        yield
    finally:
        os.close(told)
        os.waitpid(child, 0)
        os.close(done)


def engine_directory(tmp_path: Path, uid: int | None = None) -> Path:
    directory = tmp_path / "m@0"
    directory.mkdir()
    if uid is not None:
        for parent in (tmp_path, *tmp_path.parents[:2]):
            parent.chmod(0o755)
        os.chown(directory, uid, uid)
    return directory


def test_the_socket_of_a_runtime_directory_is_connected_to(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path)
    with listening(directory / "engine.sock"):
        reached(socket_endpoint(directory))


def test_a_socket_that_does_not_exist_or_listen_is_gone(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path)
    gone(socket_endpoint(directory))
    gone(socket_endpoint(tmp_path / "nowhere"))
    with listening(directory / "engine.sock"):
        pass
    gone(socket_endpoint(directory))


def test_a_symlink_is_never_followed(tmp_path: Path) -> None:
    """To the registrar, to D-Bus, to another engine: as a file and as the directory."""
    directory = engine_directory(tmp_path)
    with listening(tmp_path / "registrar.sock") as registrar:
        (directory / "engine.sock").symlink_to(tmp_path / "registrar.sock")
        gone(socket_endpoint(directory))
        (tmp_path / "link").symlink_to(tmp_path)
        (tmp_path / "engine.sock").hardlink_to(tmp_path / "registrar.sock")
        gone(socket_endpoint(tmp_path / "link"))
        registrar.setblocking(False)
        with pytest.raises(BlockingIOError):
            registrar.accept()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: Path(path).write_text("x")], ids=["fifo", "directory", "file"]
)
def test_what_is_no_socket_is_gone(tmp_path: Path, make: Callable[[Path], object]) -> None:
    directory = engine_directory(tmp_path)
    make(directory / "engine.sock")
    gone(socket_endpoint(directory))


@as_root
def test_a_socket_file_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path, EVE)
    with listening(directory / "engine.sock") as listener:  # root's, in the engine's directory: a hard link would look so
        gone(socket_endpoint(directory))
        os.chown(directory / "engine.sock", EVE, EVE)  # the file is the engine's, who listens is not
        gone(socket_endpoint(directory))
        assert listener.fileno() >= 0


@as_root
def test_the_owner_of_the_directory_is_the_engine(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path, EVE)

    def listen() -> socket.socket:
        os.chdir(directory)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("engine.sock")
        listener.listen()
        return listener

    with as_user(EVE, listen):
        reached(socket_endpoint(directory))


@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::")],
    ids=["own", "any", "dual"],
)
def test_a_port_of_the_engines_own_user_is_connected_to(tmp_path: Path, family: int, host: str) -> None:
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        reached(port_endpoint(listener.getsockname()[1], engine_directory(tmp_path)))
    gone(port_endpoint(listener.getsockname()[1] if listener.fileno() >= 0 else 1, tmp_path / "m@0"))


@as_root
@pytest.mark.parametrize("accepts", [False, True], ids=["waits", "accepts"])
def test_a_port_that_another_user_has_taken_is_refused(tmp_path: Path, accepts: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def listen() -> object:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        kept: list[object] = [listener]

        def accept() -> None:
            while True:
                kept.append(listener.accept())

        if accepts:
            threading.Thread(target=accept, daemon=True).start()
        return kept

    directory = engine_directory(tmp_path)
    with as_user(EVE, listen):
        gone(port_endpoint(port, directory))
        os.chown(directory, EVE, EVE)
        reached(port_endpoint(port, directory))


@as_root
def test_a_connection_that_somebody_else_has_accepted_is_refused() -> None:
    """The listener is the engine's by now, the connection that was made before is not."""
    first = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(first.getsockname())
    accepted, _ = first.accept()
    os.fchown(accepted.fileno(), EVE, EVE)
    with first, client, accepted:
        check = pytest.raises(ForeignListenerError)
        with check:
            check_owner(client.getsockname(), client.getpeername(), os.geteuid())


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path)

    async def scenario() -> None:
        with listening(directory / "engine.sock", backlog=0) as listener, contextlib.ExitStack() as clients:
            listener.setblocking(False)
            held = clients.enter_context(socket.socket(socket.AF_UNIX))
            held.connect(str(directory / "engine.sock"))
            tries = [asyncio.create_task(connect(socket_endpoint(directory))) for _ in range(12)]
            await asyncio.sleep(0.05)
            assert not any(each.done() for each in tries)
            while not all(each.done() for each in tries):
                with contextlib.suppress(BlockingIOError):
                    clients.enter_context(listener.accept()[0])
                await asyncio.sleep(0.001)
            for each in tries:
                await each

    uvloop.run(scenario())


def test_a_backlog_that_stays_full_is_no_death(tmp_path: Path) -> None:
    directory = engine_directory(tmp_path)
    with listening(directory / "engine.sock", backlog=0), socket.socket(socket.AF_UNIX) as held:
        held.connect(str(directory / "engine.sock"))
        with pytest.raises(EngineUnavailableError) as raised:
            uvloop.run(connect(socket_endpoint(directory)))
    assert raised.value.code == "engine_overloaded"


@contextmanager
def no_descriptors(spare: int = 0) -> Iterator[None]:
    """The process may open `spare` files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("spare", range(3))
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_our_own_lack_of_descriptors_is_no_death(tmp_path: Path, spare: int, kind: str) -> None:
    directory = engine_directory(tmp_path)

    async def scenario(endpoint: str) -> str:
        await asyncio.sleep(0)
        with no_descriptors(spare), pytest.raises(EngineUnavailableError) as raised:
            await connect(endpoint)
        return raised.value.code

    with listening(directory / "engine.sock"), socket.create_server(("127.0.0.1", 0)) as port:
        endpoint = socket_endpoint(directory) if kind == "unix" else port_endpoint(port.getsockname()[1], directory)
        if kind == "tcp" and spare == 2:
            return  # socket and directory, then socket and netlink: two are enough
        assert uvloop.run(scenario(endpoint)) == "gateway_overloaded"


def test_an_endpoint_that_is_not_known_is_no_death() -> None:
    with pytest.raises(EngineUnavailableError):
        uvloop.run(connect(UNKNOWN_ENDPOINT))


@as_root
def test_a_socket_that_may_not_be_connected_to_is_no_death(tmp_path: Path) -> None:
    """EACCES says nothing about the engine's process."""
    directory = engine_directory(tmp_path)
    directory.chmod(0o700)
    with listening(directory / "engine.sock"):

        def ask() -> None:
            with pytest.raises(EngineUnavailableError):
                asyncio.run(connect(socket_endpoint(directory)))

        with as_user(EVE, ask):
            pass


# Control calls

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n" + b'{"is_sleeping": true}'


def call(tmp_path: Path, *pieces: bytes, endless: bytes = b"", timeout_s: float = 2.0) -> tuple[object, int]:
    """What a control call finds where an engine answers so, and how many bytes the engine could send."""
    directory, sent = engine_directory(tmp_path), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            while endless:
                writer.write(endless)
                sent += len(endless)
                await writer.drain()
        writer.close()

    async def scenario() -> object:
        server = await asyncio.start_unix_server(serve, directory / "engine.sock")
        try:
            return await EngineClient(socket_endpoint(directory)).call(HttpCall("GET", "/is_sleeping", timeout_s=timeout_s))
        except EngineError as error:
            return error
        finally:
            server.close()

    return uvloop.run(scenario()), sent


def test_a_control_call_is_answered(tmp_path: Path) -> None:
    assert call(tmp_path, OK[:30], OK[30:])[0] == {"is_sleeping": True}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n15\r\n" + OK[-21:] + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + OK[-21:],
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    ],
    ids=["chunked", "to-the-end", "after-100"],
)
def test_every_framing_of_a_control_answer_is_read(tmp_path: Path, answer: bytes) -> None:
    assert call(tmp_path, answer)[0] == {"is_sleeping": True}


@pytest.mark.parametrize(
    ("begin", "endless"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 400000000\r\n\r\n", b" " * 65536),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"e" * 65536),
    ],
    ids=["length", "to-the-end", "chunked", "head", "interim", "extension"],
)
def test_an_answer_without_end_is_cut(tmp_path: Path, begin: bytes, endless: bytes) -> None:
    found, sent = call(tmp_path, begin, endless=endless)
    assert isinstance(found, EngineError)
    assert sent < 8 << 20, "it was read on"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 404, 500])
def test_no_redirect_is_followed(tmp_path: Path, status: int) -> None:
    asked: list[bytes] = []

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        answer = b"HTTP/1.1 %d X\r\nLocation: http://127.0.0.1:%d/sleep\r\nContent-Length: 0\r\n\r\n" % (status, port)
        assert isinstance(call(tmp_path, answer)[0], EngineError)
        other.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            asked.append(other.accept()[0].recv(100))
    assert not asked


def test_one_deadline_covers_a_dripping_answer(tmp_path: Path) -> None:
    found, _ = call(tmp_path, b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", endless=b"", timeout_s=0.2)
    assert isinstance(found, EngineError)


@pytest.mark.parametrize("content", [b"[" * 60_000, b'"\\ud800"', b"[1]", b"\xff", b"1" * 5000], ids=repr)
def test_an_answer_that_is_no_object_tells_nothing(tmp_path: Path, content: bytes) -> None:
    assert call(tmp_path, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content), content)[0] == {}


def test_shortages_are_told_from_deaths() -> None:
    from mmd.errors import MmdError
    from mmd.shortage import is_shortage

    assert is_shortage(OSError(errno.EMFILE, "x"))
    assert is_shortage(MemoryError())
    assert not is_shortage(OSError(errno.ECONNREFUSED, "x"))
    wrapped = MmdError("x")
    wrapped.__cause__ = OSError(errno.ENFILE, "y")
    assert is_shortage(wrapped)
