"""Web pages that have a browser ask the gateway for them: what they may not, and the clients that are none and may.

Everything that goes through a gateway runs with its one process, and with workers. tests/browser does the same in Chromium.
"""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import relay_gateway
from relay_gateway import OK, Connection, Script, body_of, ok_answer, relay, run

from mmd.config import Gateway
from mmd.gateway.relay import host_names
from mmd.gateway.relay.host_names import host_of, is_address, own_names
from mmd.gateway.relay.pages import is_foreign, leads_here
from mmd.gateway.server import Door
from mmd.keys import Key, KeyRing, digest, key_text
from mmd.kinds import BadValueError
from mmd.origins import HOST_NAME

SECRET = key_text(b"page".ljust(32, b"."))
RING = KeyRing((Key("ci", digest(SECRET.encode())),), 1)
_PAGE = "https://app.example"


@pytest.fixture(params=[0, 2], ids=["alone", "workers"])
def processes(request: pytest.FixtureRequest) -> Iterator[None]:
    relay_gateway.default_workers = request.param
    yield
    relay_gateway.default_workers = 0


def asking(host: str, *fields: str, path: str = "/v1/chat/completions", body: bytes = b"", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *fields, *([f"Content-Length: {len(body)}"] if body else [])]
    return "\r\n".join([*lines, "", ""]).encode() + body


_FOREIGN = {
    "a text/plain POST, which a form could send": ("localhost:8000", "Origin: http://evil.example", "Content-Type: text/plain"),
    "a sandboxed frame": ("localhost:8000", "Origin: null"),
    "another port": ("localhost:8000", "Origin: http://localhost:3000"),
    "an origin that begins like a listed one": ("localhost:8000", f"Origin: {_PAGE}.evil.example"),
    "no origin, but a site": ("127.0.0.1:8000", "Sec-Fetch-Site: cross-site"),
    "a sibling site": ("127.0.0.1:8000", "Sec-Fetch-Site: same-site"),
}
_REBOUND = {
    "a name of the page's own": ("evil.example:8000",),
    "the same, in its own origin": ("evil.example:8000", "Origin: http://evil.example:8000", "Sec-Fetch-Site: same-origin"),
    "an address in a name": ("127.0.0.1.evil.example:8000",),
    "no name": (":8000",),
    "half an address": ("[::1",),
    "an empty Host": ("",),
    "localhost of somebody": ("localhost.evil.example",),
}
_WELCOME = {
    "an address": ("127.0.0.1:8000",),
    "another port": ("127.0.0.1:1",),
    "IPv6": ("[::1]:8000",),
    "any address": ("192.0.2.7",),
    "localhost": ("localhost:8000",),
    "a name of localhost": ("mmd.localhost",),
    "a final dot": ("localhost.",),
    "capitals": ("LOCALHOST:8000",),
    "the machine": (f"{socket.gethostname()}:8000",),
    "mDNS": (f"{socket.gethostname().partition('.')[0]}.local",),
    "Docker": ("host.docker.internal:8000",),
    "Podman": ("host.containers.internal:8000",),
    "named": ("llm.example.org",),
    "our own page": ("localhost:8000", "Origin: http://localhost:8000", "Sec-Fetch-Site: same-origin"),
    "typed by a person": ("localhost:8000", "Sec-Fetch-Site: none"),
    "a listed page": ("localhost:8000", f"Origin: {_PAGE}", "Sec-Fetch-Site: cross-site"),
    "a proxy by the name of a listed page": ("app.example", f"Origin: {_PAGE}"),
}
_SETTINGS = Gateway(hosts=("llm.example.org",), cors_origins=(_PAGE,))


@pytest.mark.usefixtures("processes")
def test_no_foreign_page_reaches_a_model(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script, settings=_SETTINGS, ready=False) as running:
            connection = await running.connect()
            for cases, code in ((_FOREIGN, "foreign_page"), (_REBOUND, "foreign_name")):
                for what, (host, *fields) in cases.items():
                    requests = {
                        path: asking(host, *fields, path=path, body=body_of("m"))
                        for path in ("/v1/chat/completions", "/upstream/m/v1/completions", "/v1/responses", "/api/v1/reload")
                    }
                    requests["/v1/models"] = asking(host, *fields, path="/v1/models", method="GET")
                    requests["/upstream/m/"] = asking(host, *fields, path="/upstream/m/", method="GET")
                    for path, request in requests.items():
                        status, answer, content = await connection.ask(request)
                        assert (status, json.loads(content)["error"]["code"]) == (403, code), (what, path, content)
                        assert "access-control-allow-origin" not in answer
            assert not script.requests
            assert not running.lifecycle.actions, "nothing was started"
            assert not running.inference.counters, "nor counted"

    run(check())


@pytest.mark.usefixtures("processes")
def test_clients_that_are_no_pages_are_served_as_they_were(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_SETTINGS) as running:
            connection = await running.connect()
            for what, (host, *fields) in _WELCOME.items():
                for _ in range(2):  # the head is known the second time
                    status, _, content = await connection.ask(asking(host, *fields, body=body_of("m")))
                    assert (status, content) == (200, OK), what
            assert (await connection.ask(asking("evil.example", path="/health", method="GET")))[0] == 200
            old = await running.connect()
            await old.send(b"GET /v1/models HTTP/1.0\r\n\r\n")
            assert (await old.answer())[0] == 200, "HTTP/1.0 has no Host"
            for name in ("127.0.0.1", "localhost"):
                url = f"http://{name}:{running.port}/v1"
                async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                    await client.chat.completions.create(model="m", messages=[])

    run(check())


@pytest.mark.usefixtures("processes")
def test_a_known_key_is_what_no_page_has(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), keys=RING) as running:
            connection = await running.connect()
            for host, *fields in (*_FOREIGN.values(), *_REBOUND.values()):
                key = f"Authorization: Bearer {SECRET}"
                assert (await connection.ask(asking(host, key, *fields, body=body_of("m"))))[0] == 200, host
                wrong = "x-api-key: mmd-wrong"
                assert (await connection.ask(asking(host, wrong, *fields, body=body_of("m"))))[0] == 401, host
                assert (await connection.ask(asking(host, *fields, body=body_of("m"))))[0] == 401, host

    run(check())


@pytest.mark.usefixtures("processes")
def test_the_refusal_says_which_line_to_write_and_the_line_helps(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script()) as running:
            connection = await running.connect()
            request = asking("LLM.example.org:8443", body=body_of("m"))
            _, _, content = await connection.ask(request)
            message = json.loads(content)["error"]["message"]
            assert "gateway: {hosts: [llm.example.org]}" in message
            assert "/etc/mmd/mmd.yaml" in message
            config = running.dispatcher.config._replace(gateway=Gateway(hosts=("llm.example.org",)))
            running.dispatcher.reconfigure(config, {}, 1 << 40)
            if running.staff is not None:
                running.staff.configure(config)
                await asyncio.sleep(0.1)
            assert (await connection.ask(request))[0] == 200, "a changed configuration counts for heads that are known"
            _, _, content = await connection.ask(asking("{'; rm", body=body_of("m")))
            assert "hosts:" not in json.loads(content)["error"]["message"], "what is no name is not to be written anywhere"
            messages = asking("evil.example", path="/v1/messages", body=body_of("m"))
            error = json.loads((await connection.ask(messages))[2])
            assert (error["type"], error["error"]["type"]) == ("error", "permission_error"), "in the shape of each API"

    run(check())


def test_the_admin_s_tcp_is_guarded_and_unix_sockets_are_not(tmp_path: Path) -> None:
    async def check() -> None:
        for door, expected in ((Door.ADMIN_TCP, 403), (Door.API, 403)):
            async with relay(tmp_path, Script(), door=door) as running:
                connection = await running.connect()
                for path in ("/api/v1/status", "/v1/models"):
                    assert (await connection.ask(asking("evil.example", path=path, method="GET")))[0] == expected
                ours, theirs = socket.socketpair()
                await running.server.adopt(theirs, b"", None)
                unix = Connection(*await asyncio.open_connection(sock=ours))
                assert (await unix.ask(asking("evil.example", path="/v1/models", method="GET")))[0] == 200
                await unix.close()

    run(check())


@pytest.mark.usefixtures("processes")
def test_web_sockets_of_rebound_names_are_refused(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script, settings=_SETTINGS) as running:
            upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
            for origin in ("http://evil.example", "null", f"{_PAGE}x"):
                connection = await running.connect()
                fields = (*upgrade, f"Origin: {origin}")
                request = asking("evil.example", *fields, path="/v1/realtime?model=m", method="GET")
                assert (await connection.ask(request))[0] == 403
            assert not script.requests

    run(check())


def test_hosts_are_taken_apart_strictly() -> None:
    assert [host_of(each) for each in (b"A.b:80", b"[::1]:80", b"[::1]", b"x.")] == ["a.b", "::1", "::1", "x"]
    for bad in (b"x:80x", b"[::1", b"[x]", b"[::1]80", b"x" * 400, "\u00fc".encode()):
        assert host_of(bad) == "", bad
    assert not is_address(b"user@127.0.0.1")
    assert not is_address(b"127.0.0.1/x")
    assert not is_address(b"0x7f.1"), "browsers write addresses in one way"
    assert leads_here(b"Llm:80", ("llm",))
    assert not leads_here(b"", ("",))


def test_the_machine_s_names_are_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 box.lan.example Box # evil\n10.0.0.9 db.example\n")
    monkeypatch.setattr(host_names, "_HOSTS", tmp_path / "hosts")
    host_names._names.cache_clear()
    names = host_names._names("box")
    assert {"box", "box.local", "box.lan.example", "host.docker.internal"} <= set(names)
    assert not {"localhost", "db.example", "evil", ""} & set(names)
    host_names._names.cache_clear()
    assert socket.gethostname().lower() in own_names()


def test_a_star_covers_what_names_no_origin_but_for_changes() -> None:
    for origin in (b"", b"https://x"):
        assert not is_foreign(origin, b"cross-site", b"h", ("*",))
        assert is_foreign(origin, b"cross-site", b"h", ("*",), by_name=True)
    assert not is_foreign(b"http://h", b"same-origin", b"H", ())
    assert is_foreign(b"http://h", b"cross-site", b"h", ())


def test_names_of_hosts_are_names_and_nothing_else() -> None:
    assert HOST_NAME.read("LLM.example.org") == "llm.example.org"
    for bad in ("*", "*.example.org", "http://x", "x:80", "x/", "", "a..b", "x y", "[::1]", 5, None, "x" * 254, "a\n"):
        with pytest.raises(BadValueError):
            HOST_NAME.read(bad)


_THEIRS = (
    b"Set-Cookie: session=1\r\nX-Content-Type-Options: sniff\r\nContent-Security-Policy: default-src 'self'\r\n"
    b"Clear-Site-Data: *\r\nService-Worker-Allowed: /\r\nStrict-Transport-Security: max-age=1\r\nX-Its-Own: 1\r\n"
)
_SANDBOX = "Content-Security-Policy: sandbox\r\n"


async def _head(connection: Connection, request: bytes) -> str:
    """Of the answer, as it came."""
    await connection.send(request)
    async with asyncio.timeout(5):
        head = (await connection.reader.readuntil(b"\r\n\r\n")).decode()
        if "chunked" in head:
            await connection.reader.readuntil(b"0\r\n\r\n")
        elif "Content-Length" in head:
            await connection.reader.readexactly(int(head.lower().partition("content-length: ")[2].partition("\r")[0]))
    return head


@pytest.mark.usefixtures("processes")
def test_what_an_engine_answers_is_no_page_of_the_gateway_s_origin(tmp_path: Path) -> None:
    async def check() -> None:
        date = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        events = (
            b"HTTP/1.1 200 OK\r\n%bContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n" % _THEIRS,
            b"3\r\n<b>\r\n0\r\n\r\n",
        )
        moved = b"HTTP/1.1 307 Temporary Redirect\r\n%bLocation: /there\r\nContent-Length: 0\r\n\r\n" % _THEIRS
        switched = b"HTTP/1.1 101 Switching Protocols\r\n%bConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" % _THEIRS
        script = Script(ok_answer(more=_THEIRS), ok_answer(more=_THEIRS + date), ok_answer(more=_THEIRS + date), events, moved)
        async with relay(tmp_path, script) as running:
            connection = await running.connect()
            chat = asking("localhost", body=body_of("m"))
            upstream = asking("localhost", path="/upstream/m/v1/completions", body=body_of("m"))
            for request in (chat, upstream, chat, upstream, upstream):
                head = await _head(connection, request)
                assert head.count(_SANDBOX) == 1, head
                assert head.count("X-Content-Type-Options: ") == head.count("X-Content-Type-Options: nosniff\r\n") == 1
                assert "Content-Security-Policy: default-src 'self'\r\n" in head, "both hold"
                assert "X-Its-Own: 1\r\n" in head
                for field in ("Set-Cookie", "Clear-Site-Data", "Service-Worker-Allowed", "Strict-Transport-Security"):
                    assert field not in head
            assert "Location: /upstream/m/there\r\n" in head

            async def switching(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(switched)
                await writer.drain()
                await reader.read()

            (tmp_path / "ws").mkdir()
            async with relay(tmp_path / "ws", switching) as other:
                upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
                request = asking("localhost", *upgrade, path="/v1/realtime?model=m", method="GET")
                head = await _head(await other.connect(), request)
                assert head.startswith("HTTP/1.1 101 ")
                assert "Set-Cookie" not in head

    run(check())


def test_comments_of_a_stream_that_waits_are_sandboxed_as_what_follows(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=Gateway(loading_keepalive_s=0.05), ready=False) as running:
            running.lifecycle.start_s = 0.3
            head = await _head(await running.connect(), asking("localhost", body=body_of("m", stream=True)))
            assert _SANDBOX in head

    run(check())


def test_programs_are_not_served_beside_the_admin_api(tmp_path: Path) -> None:
    async def check() -> None:
        for door, expected in ((Door.ADMIN_TCP, 404), (Door.API, 200), (Door.ADMIN_SOCKET, 200)):
            script = Script()
            async with relay(tmp_path, script, door=door) as running:
                connection = await running.connect()
                request = asking("localhost", path="/upstream/m/v1/completions", body=body_of("m"))
                status, _, content = await connection.ask(request)
                assert (status, len(script.requests)) == (expected, int(expected == 200))
                if status == 404:
                    assert "127.0.0.1:8000" in json.loads(content)["error"]["message"]
                assert (await connection.ask(asking("localhost", body=body_of("m"))))[0] == 200

    run(check())
