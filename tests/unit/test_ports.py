"""Models' own ports: sockets that are handed over by the program that systemd runs, and what HTTP ones do with requests."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from relay_gateway import (
    OK,
    Connection,
    Running,
    Script,
    chat_bytes,
    engine,
    gateway,
    ok_answer,
    outer_address,
    read_request,
    run,
    until,
)

from mmd.config import Config, EngineKind, Filters, Gateway, Model, PortProtocol
from mmd.gateway.ports import Ports, is_port
from mmd.gateway.relay.client import ClientConnection
from mmd.gateway.relay.head import RequestParser
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.relay.port_route import PortRoute
from mmd.gateway.requests import cancel, requests_on
from mmd.gateway.serving import Serving
from mmd.keys import Key, KeyRing, digest, key_text
from mmd.systemd.activation import ListenSocket


@dataclass
class Site:
    running: Running
    ports: Ports
    servers: list[Serving]
    path: Path

    async def configure(self, models: Mapping[str, Model], settings: Gateway | None = None) -> None:
        gateway = (settings or Gateway())._replace(hosts=("x",))  # what most requests of the tests call it
        self.running.dispatcher.reconfigure(Config(gateway=gateway, models=models), {}, 1 << 40)
        await self.ports.arrange()

    async def unit(self, verb: str, unit_id: str, listening: socket.socket | None = None) -> int:
        """What mmd-port@.service runs; its exit status."""
        command = 'export LISTEN_PID=$$; exec "$@"' + ("" if listening is None else f" 3<&{listening.fileno()}")
        argv = (sys.executable, "-I", "-m", "mmd.systemd.handport", verb, unit_id, str(self.path))
        passed = () if listening is None else (listening.fileno(),)
        process = await asyncio.create_subprocess_exec("/bin/bash", "-c", command, "sh", *argv, pass_fds=passed)
        return await process.wait()


@asynccontextmanager
async def site(
    path: Path,
    serve: Callable[..., Awaitable[None]],
    sockets: tuple[ListenSocket, ...] = (),
    workers: int = 0,
    *,
    ready: bool = True,
) -> AsyncIterator[Site]:
    async with (
        engine(path / "engine.sock", serve) as endpoint,
        gateway({"m": endpoint}, workers=workers, ready=ready) as running,
    ):
        servers: list[Serving] = []
        ports = Ports(running.dispatcher, running.inference, servers, path / "ports.sock", sockets)
        ports.prepare()
        for server in servers:
            await server.start()
        await ports.listen()
        try:
            yield Site(running, ports, servers, path / "ports.sock")
        finally:
            await ports.hold()
            for server in tuple(servers):
                await server.stop_accepting()
                await server.drain(0)
            ports.close()
            await asyncio.sleep(0.05)


def model(port: str, protocol: PortProtocol = PortProtocol.HTTP, name: str = "m", unit_id: str = "m") -> dict[str, Model]:
    return {name: Model(name, unit_id, EngineKind.SIM, gpus=0, port=port, port_protocol=protocol)}


def address(listening: socket.socket) -> str:
    return "{}:{}".format(*listening.getsockname())


async def ask(listening: socket.socket, body: bytes = b"{}", path: bytes = b"/v1/chat/completions") -> tuple[int, bytes]:
    """Or, where the kernel alone answers, a TimeoutError."""
    reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
    connection = Connection(reader, writer)
    try:
        async with asyncio.timeout(1):
            status, _, content = await connection.ask(
                b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)
            )
    finally:
        writer.transport.abort()
    return status, content


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])
def test_a_port_is_handed_over_served_moved_and_closed(tmp_path: Path, workers: int) -> None:
    async def work() -> None:
        first, second = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        async with site(tmp_path, Script(), workers=workers) as there:
            assert await there.unit("open", "m", first) == 0
            with pytest.raises(TimeoutError):  # the configuration knows of no port
                await ask(first)
            await there.configure(model(address(first)))
            assert await ask(first) == (200, OK)
            await there.configure(model(address(second)))
            with pytest.raises(TimeoutError):
                await ask(first)
            assert await there.unit("open", "m", second) == 0
            assert await ask(second) == (200, OK)
            first_address = first.getsockname()
            first.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*first_address)
            assert await there.unit("close", "m") == 0
            assert there.ports.sockets[1:] == ()
            second.close()
            await until(lambda: not there.servers)

    run(work())


def test_a_change_of_protocol_or_name_leaves_what_is_under_way(tmp_path: Path) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsl")
        await asyncio.sleep(0.6)
        writer.write(b"ow")
        await reader.read(-1)

    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        async with site(tmp_path, slow) as there:
            await there.configure(model(address(listening)))
            assert await there.unit("open", "m", listening) == 0
            under_way = asyncio.create_task(ask(listening))
            await until(lambda: there.running.in_flight == 1)
            await there.configure(model(address(listening), PortProtocol.TCP))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"no HTTP at all\r\n\r\n")
            assert (await reader.readexactly(8)).startswith(b"HTTP/1.1")
            assert await under_way == (200, b"slow")
            await until(lambda: len(there.servers) == 1)
            await there.configure(model(address(listening), name="renamed"))
            writer.transport.abort()
            await until(lambda: len(there.servers) == 1)
        listening.close()

    run(work())


def test_the_next_gateway_inherits_ports_and_who_hands_over_meanwhile_is_heard_by_it(tmp_path: Path) -> None:
    async def work() -> None:
        first, second = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
        async with site(tmp_path, Script()) as old:
            await old.configure(model(address(first)))
            assert await old.unit("open", "m", first) == 0
            await old.ports.hold()
            late = asyncio.create_task(old.unit("open", "n", second))
            inherited = tuple(ListenSocket(each.name, each.socket.dup()) for each in old.ports.sockets)
            assert [each.name for each in inherited] == ["mmd-ports", "mmd-port-m"]
            assert all(is_port(each.name) for each in inherited)
            old.servers[0].hand_over(lambda *_: None)
            old.ports.close()
            (tmp_path / "next").mkdir()
            async with site(tmp_path / "next", Script(), inherited) as new:
                models = {**model(address(first)), **model(address(second), name="n", unit_id="n")}
                await new.configure(models)
                assert await ask(first) == (200, OK)
                assert await late == 0
                assert [each.name for each in new.ports.sockets][1:] == ["mmd-port-m", "mmd-port-n"]
                assert len(new.servers) == 2
        first.close()
        second.close()

    run(work())


def test_without_a_gateway_there_is_nothing_to_close(tmp_path: Path) -> None:
    async def work() -> None:
        async with site(tmp_path, Script()) as there:
            there.path.unlink()
            with socket.create_server(("127.0.0.1", 0)) as listening:
                assert await there.unit("open", "m", listening) == 1
            assert await there.unit("close", "m") == 0
            there.path.touch()

    run(work())


def test_a_unix_socket_and_an_ipv6_address(tmp_path: Path) -> None:
    async def work() -> None:
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(tmp_path / "m.sock"))
        unix.listen()
        six = socket.create_server(("::1", 0), family=socket.AF_INET6)
        async with site(tmp_path, Script()) as there:
            models = {
                **model(str(tmp_path / "m.sock")),
                **model(f"[0:0::1]:{six.getsockname()[1]}", name="n", unit_id="n"),
            }
            await there.configure(models)
            assert await there.unit("open", "m", unix) == 0
            assert await there.unit("open", "n", six) == 0
            assert {server.name for server in there.servers} == {"mmd-port-m", "mmd-port-n"}
        unix.close()
        six.close()

    run(work())


# What an HTTP port does with a request.

_CONFIG = Config(
    models={
        "m": Model("m", "m", EngineKind.SIM, gpus=0, aliases=("mine",), lora={"adapter": "/a"}),
        "strict": Model("strict", "strict", EngineKind.SIM, gpus=0, filters=Filters(("x",), {"y": 1})),
        "other": Model("other", "other", EngineKind.SIM, gpus=0, aliases=("theirs",)),
        "prog": Model("prog", "prog", EngineKind.COMMAND, gpus=0, aliases=("p",)),
        "ext": Model("ext", "ext", EngineKind.EXTERNAL, gpus=0, model="inner", endpoint="http://127.0.0.1:1"),
    }
)
_CHAT = "/v1/chat/completions"


def aimed(name: str, target: str, body: bytes = b"", *, method: str = "POST", content_type: str = "") -> tuple[str, bytes]:
    """The target and the body that the engine gets; ApiError."""
    parser = RequestParser()
    more = f"Content-Type: {content_type}\r\n" if content_type else ""
    parser.parse(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode())
    model, _, body, target_at_engine, _ = PortRoute(name).aim(parser.head, body, _CONFIG, KeptAnswers())
    assert model.name == name
    return target_at_engine.decode(), body


@pytest.mark.parametrize(
    ("name", "said", "asked"),
    [
        ("m", {}, {"model": "m"}),
        ("m", {"model": ""}, {"model": "m"}),
        ("m", {"model": "mine"}, {"model": "m"}),
        ("m", {"model": "adapter"}, {"model": "adapter"}),
        ("m", {"model": "gpt-4", "stream": True}, {"model": "m", "stream": True}),
        ("strict", {"model": "strict", "x": 1, "z": 1}, {"model": "strict", "y": 1, "z": 1}),
        ("prog", {"model": "p"}, {"model": "prog"}),
        ("prog", {"model": "its own"}, {"model": "its own"}),
        ("prog", {"a": 1}, {"a": 1}),
        ("ext", {"model": "ext"}, {"model": "inner"}),
        ("ext", {"model": "gpt-4"}, {"model": "inner"}),
    ],
)
def test_names_in_documents(name: str, said: object, asked: object) -> None:
    target, body = aimed(name, _CHAT, json.dumps(said).encode())
    assert (target, json.loads(body)) == (_CHAT, asked)


@pytest.mark.parametrize("wrong", ["other", "theirs"])
@pytest.mark.parametrize("name", ["m", "prog"])
def test_another_model_s_name_is_refused(name: str, wrong: str) -> None:
    for target, body, content_type in (
        (_CHAT, json.dumps({"model": wrong}).encode(), ""),
        (f"/v1/realtime?model={wrong}", b"", ""),
        ("/v1/audio/transcriptions", form(wrong), "multipart/form-data; boundary=b"),
    ):
        with pytest.raises(Exception, match=f"this port serves {name} only, and not '{wrong}'"):
            aimed(name, target, body, content_type=content_type, method="GET" if "?" in target else "POST")


def form(name: str | None) -> bytes:
    field = b"" if name is None else b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % name.encode()
    return field + b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\ndata\r\n--b--\r\n'


def test_names_in_forms_and_queries() -> None:
    def transcribe(name: str, said: str | None) -> bytes:
        return aimed(name, "/v1/audio/transcriptions", form(said), content_type="multipart/form-data; boundary=b")[1]

    assert transcribe("m", "whisper-1") == form("m")
    assert transcribe("m", None) == form(None)
    assert transcribe("prog", "its-own") == form("its-own")
    assert aimed("m", "/v1/realtime?model=mine&x=1", method="GET")[0] == "/v1/realtime?model=m&x=1"
    assert aimed("m", "/v1/realtime", method="GET")[0] == "/v1/realtime"
    assert aimed("m", "/v1/realtime?model=m", method="GET")[0] == "/v1/realtime?model=m"
    assert aimed("prog", "/v1/realtime?a=b", method="GET")[0] == "/v1/realtime?a=b"


def test_paths_are_those_of_upstream() -> None:
    for target, method in (("/", "GET"), ("/ui/x?y", "GET"), ("/sleep", "POST"), ("/upstream/x", "PUT"), ("/x", "OPTIONS")):
        assert aimed("prog", target, b"any", method=method) == (target, b"any")
    for target, method in (("/", "GET"), ("/sleep", "POST"), ("/upstream/m/v1/models", "GET"), ("//v1/models", "GET")):
        with pytest.raises(Exception, match="is not open to clients"):
            aimed("m", target, method=method)
    assert aimed("m", "/v1/models", method="GET") == ("/v1/models", b"")
    assert aimed("m", "/v1/responses/resp_1", method="GET")[0] == "/v1/responses/resp_1"
    assert aimed("prog", _CHAT, os.urandom(99).replace(b"{", b""))[0] == _CHAT, "its own idea of that path"
    with pytest.raises(Exception, match="the body is not JSON"):
        aimed("m", _CHAT, b"nonsense")
    with pytest.raises(Exception, match="has been removed"):
        aimed("gone", "/")


def test_a_large_body_is_refused_in_words(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        async with site(tmp_path, Script()) as there:
            config = Config(models=model(address(listening)))
            config = config._replace(gateway=config.gateway._replace(max_body_bytes=1000, hosts=("x",)))
            there.running.dispatcher.reconfigure(config, {}, 1 << 40)
            assert await there.unit("open", "m", listening) == 0
            status, content = await ask(listening, b'{"x": "' + b"x" * 2000 + b'"}')
            assert (status, json.loads(content)["error"]["code"]) == (413, "body_too_large")
        listening.close()

    run(work())


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])
def test_an_answer_that_is_kept_is_for_the_key_that_made_it_at_a_port_as_well(tmp_path: Path, workers: int) -> None:
    secrets = {name: key_text(name.encode().ljust(32, b".")) for name in ("maker", "other")}
    ring = KeyRing(tuple(Key(name, digest(secret.encode())) for name, secret in secrets.items()), 1)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await read_request(reader)
                writer.write(ok_answer(b'{"id": "resp_1", "choices": []}'))
                await writer.drain()

    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        async with site(tmp_path, answer, workers=workers) as there:
            await there.configure(model(address(listening)))
            assert await there.unit("open", "m", listening) == 0
            await there.running.use_keys(ring)

            async def asked(key: str, method: str, path: str, body: str = "") -> int:
                reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
                head = (
                    f"{method} {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {secrets[key]}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                status, *_ = await Connection(reader, writer).ask((head + body).encode())
                writer.transport.abort()
                return status

            assert await asked("maker", "POST", "/v1/responses", '{"model": "m", "input": "hi"}') == 200
            await until(lambda: there.running.dispatcher.kept().owner("resp_1"))
            going_on = '{"model": "m", "input": "hi", "previous_response_id": "resp_1"}'
            for key, expected in (("other", 404), ("maker", 200)):
                assert await asked(key, "GET", "/v1/responses/resp_1") == expected
                assert await asked(key, "POST", "/v1/responses", going_on) == expected
        listening.close()

    run(work())


def test_a_program_gets_the_host_that_its_client_asked_for(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        script = Script()
        async with site(tmp_path, script) as there:
            for kind in (EngineKind.COMMAND, EngineKind.SIM):
                await there.configure({"m": Model("m", "m", kind, gpus=0, port=address(listening))})
                if not there.servers:
                    assert await there.unit("open", "m", listening) == 0
                assert await ask(listening) == (200, OK)
            hosts = [head.lower().partition(b"\r\nhost: ")[2].partition(b"\r\n")[0] for head, _ in script.requests]
            assert hosts == [b"x", b"localhost"]
        listening.close()

    run(work())


_PAGE = "https://app.example"


def preflight(path: str, origin: str = _PAGE) -> bytes:
    return f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\r\n".encode()


@pytest.mark.parametrize("kind", [EngineKind.SIM, EngineKind.COMMAND])
def test_pages_may_call_a_port_as_they_may_the_gateway(tmp_path: Path, kind: EngineKind) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        theirs = b"Access-Control-Allow-Origin: https://the.engines\r\nX-Request-Id: its-own\r\nSet-Cookie: a=b\r\n"
        script = Script(ok_answer(more=theirs))
        async with site(tmp_path, script) as there:
            models = {"m": Model("m", "m", kind, gpus=0, port=address(listening))}
            await there.configure(models, Gateway(cors_origins=(_PAGE,)))
            assert await there.unit("open", "m", listening) == 0
            connection = Connection(*await asyncio.open_connection(*listening.getsockname()))
            for path in ("/v1/chat/completions", "/api/prompt"):
                await connection.send(preflight(path))
                status, fields, _ = await connection.answer("OPTIONS")
                assert (status, fields["access-control-allow-origin"]) == (204, _PAGE)
            await connection.send(preflight("/api/prompt", "https://evil.example"))
            assert (await connection.answer())[0] == 403
            assert script.requests == [], "the gateway answers browsers by itself"
            more = f"Origin: {_PAGE}\r\nX-Request-Id: my-own\r\n".encode()
            status, fields, _ = await connection.ask(chat_bytes(more=more))
            assert (status, fields["access-control-allow-origin"], fields["x-request-id"]) == (200, _PAGE, "my-own")
            assert b"\r\nx-request-id: my-own\r\n" in script.requests[0][0].lower()
            assert fields["set-cookie"] == "a=b", "the engine is alone in this origin"
            assert "content-security-policy" not in fields
            await there.configure(models, Gateway(cors_origins=("*",)))
            await connection.send(preflight("/api/prompt"))
            assert (await connection.answer("OPTIONS"))[0] == 204, "/api is the program's: nothing is administered here"
            await connection.close()
            connection = Connection(*await asyncio.open_connection(*listening.getsockname()))
            await there.configure(models)
            upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
            await connection.send(b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nOrigin: http://y\r\n%b\r\n" % upgrade)
            assert (await connection.answer())[0] == 403, "a WebSocket of another page"
            await connection.close()
        listening.close()

    run(work())


def test_foreign_pages_reach_no_port_by_any_path(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        script = Script()
        async with site(tmp_path, script) as there:
            await there.configure(model(address(listening)))
            assert await there.unit("open", "m", listening) == 0
            connection = Connection(*await asyncio.open_connection(*listening.getsockname()))
            for fields in (
                "Host: x\r\nOrigin: http://evil.example",
                "Host: x\r\nSec-Fetch-Site: same-site",
                "Host: evil.example",
            ):
                for line in ("POST /v1/chat/completions", "GET /health", "GET /"):
                    assert (await connection.ask(f"{line} HTTP/1.1\r\n{fields}\r\n\r\n".encode()))[0] == 403, (fields, line)
            assert not script.requests
            assert (await connection.ask(chat_bytes()))[0] == 200
            await connection.close()
        listening.close()

    run(work())


def test_a_request_at_a_port_is_listed_and_cancelled(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        async with site(tmp_path, hang) as there:
            await there.configure(model(address(listening)))
            assert await there.unit("open", "m", listening) == 0
            asking = asyncio.create_task(ask(listening))
            await until(lambda: there.running.in_flight == 1)
            now = asyncio.get_running_loop().time()
            connections = [each for each in there.servers[0].connections if isinstance(each, ClientConnection)]
            (listed,) = requests_on(connections, now)
            assert (listed.model, listed.path, listed.state) == ("m", "/v1/chat/completions", "sent")
            assert [each.id for each in cancel(connections, listed.id, now)] == [listed.id]
            status, content = await asking
            assert (status, json.loads(content)["error"]["code"]) == (503, "cancelled_by_operator")
            await until(lambda: there.running.in_flight == 0)
        listening.close()

    run(work())


def test_a_request_that_waits_moves_with_its_id_and_its_origin(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        settings = Gateway(cors_origins=(_PAGE,))
        moved: list[Any] = []
        script = Script()
        (tmp_path / "next").mkdir()
        async with site(tmp_path, hang, ready=False) as old, site(tmp_path / "next", script) as new:
            old.running.lifecycle.start_s = 60
            await old.configure(model(address(listening)), settings)
            await new.configure(model(address(listening)), settings)
            assert await old.unit("open", "m", listening) == 0
            connection = Connection(*await asyncio.open_connection(*listening.getsockname()))
            await connection.send(chat_bytes(more=f"Origin: {_PAGE}\r\n".encode()))
            await until(lambda: old.running.in_flight == 1)
            (listed,) = requests_on([each for each in old.servers[0].connections if isinstance(each, ClientConnection)], 0)
            old.servers[0].hand_over(lambda *client: moved.append(client))
            ((descriptor, read, chunked, *_),) = moved
            assert await new.unit("open", "m", listening) == 0
            await new.servers[0].adopt(socket.socket(fileno=descriptor), read, chunked)
            status, fields, content = await connection.answer()
            assert (status, content, fields["access-control-allow-origin"]) == (200, OK, _PAGE)
            assert fields["x-request-id"] == listed.id, "what clients and engines are told of it stays"
            assert f"\r\nx-request-id: {listed.id}\r\n".encode() in script.requests[0][0].lower()
            await connection.close()
        listening.close()

    run(work())


def test_a_client_has_no_more_connections_at_a_port_than_it_may(tmp_path: Path) -> None:
    async def work() -> None:
        listening = socket.create_server((outer_address(), 0))
        async with site(tmp_path, Script()) as there:
            await there.configure(model(address(listening)), Gateway(connections_per_client=1))
            assert await there.unit("open", "m", listening) == 0
            _, writer = await asyncio.open_connection(*listening.getsockname())
            await until(lambda: there.servers[0].connections)
            connection = Connection(*await asyncio.open_connection(*listening.getsockname()))
            status, _, content = await connection.answer()
            assert (status, json.loads(content)["error"]["code"]) == (429, "too_many_connections")
            writer.close()
            await connection.close()
            await until(lambda: not there.servers[0].connections)
            assert await ask(listening) == (200, OK)
        listening.close()

    run(work())
