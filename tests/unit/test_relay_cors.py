"""Pages of other origins, as browsers speak for them: preflights, and what answers of every kind say.

Every test runs twice: with the gateway's one process, and with workers.
"""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
import relay_gateway
from aiohttp import web
from relay_gateway import OK, Script, chat_bytes, gateway, in_step, ok_answer, relay, run, until

from mmd.config import Gateway
from mmd.gateway.relay.cors import cors_lines
from mmd.kinds import BadValueError
from mmd.origins import ORIGIN

_PAGE = "https://app.example"
_NAMED = Gateway(cors_origins=(_PAGE, "http://localhost:3000"))
_ALL = Gateway(cors_origins=("*",))
_FROM_PAGE = f"Origin: {_PAGE}\r\n".encode()


@pytest.fixture(autouse=True, params=[0, 2], ids=["alone", "workers"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number: int = request.param
    monkeypatch.setattr(relay_gateway, "default_workers", number)
    return number


def preflight(path: str, origin: str = _PAGE, method: str = "POST", more: str = "") -> bytes:
    lines = f"OPTIONS {path} HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: {method}\r\n{more}\r\n"
    return lines.encode()


def cors_of(fields: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name.startswith("access-control-") or name == "vary"}


def test_a_page_that_is_named_may_call_anything(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_NAMED) as running:
            connection = await running.connect()
            asked = "Access-Control-Request-Headers: authorization,content-type,x-mmd-wait\r\n"
            asked += "Access-Control-Request-Private-Network: true\r\n"
            for path in ("/v1/chat/completions", "/v1/models", "/upstream/m/x", "/no/such/path"):
                await connection.send(preflight(path, more=asked))
                status, fields, content = await connection.answer("OPTIONS")
                assert (status, content) == (204, b"")
                assert cors_of(fields) == {
                    "access-control-allow-origin": _PAGE,
                    "access-control-allow-methods": "POST",
                    "access-control-allow-headers": "authorization,content-type,x-mmd-wait",
                    "access-control-allow-private-network": "true",
                    "access-control-expose-headers": "*",
                    "access-control-max-age": "600",
                    "vary": "Origin",
                }
                assert "content-length" not in fields
            await in_step(running, connection)

    run(check())


@pytest.mark.parametrize(
    ("settings", "origin"),
    [(Gateway(), _PAGE), (_NAMED, "https://evil.example"), (_NAMED, "null"), (_NAMED, f"{_PAGE}.evil.example"), (_NAMED, "*")],
)
def test_a_page_of_nobody_may_not(tmp_path: Path, settings: Gateway, origin: str) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=settings) as running:
            connection = await running.connect()
            status, fields, content = await connection.ask(preflight("/v1/chat/completions", origin))
            error = json.loads(content)["error"]
            assert (status, error["code"]) == (403, "origin_not_allowed")
            assert f"pages of {origin} may not send POST /v1/chat/completions: gateway.cors_origins" in error["message"]
            assert "access-control-allow-origin" not in fields
            status, fields, content = await connection.ask(chat_bytes(more=f"Origin: {origin}\r\n".encode()))
            assert (status, json.loads(content)["error"]["code"]) == (403, "foreign_page")
            assert "access-control-allow-origin" not in fields
            await in_step(running, connection)

    run(check())


def test_every_answer_says_it_once_whatever_the_engine_says(tmp_path: Path) -> None:
    async def check() -> None:
        theirs = b"Access-Control-Allow-Origin: *\r\naccess-control-allow-credentials: true\r\n"
        events = (
            b"HTTP/1.1 200 OK\r\n%bContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" % theirs,
            b"9\r\ndata: 1\n\n\r\n0\r\n\r\n",
        )
        script = Script(ok_answer(more=theirs), events, ok_answer(more=theirs))
        async with relay(tmp_path, script, settings=_NAMED) as running:
            connection = await running.connect()
            expected = {
                "access-control-allow-origin": _PAGE,
                "access-control-expose-headers": "*",
                "vary": "Origin",
            }
            requests = [
                (200, chat_bytes(more=_FROM_PAGE)),
                (200, chat_bytes(more=_FROM_PAGE, stream=True)),
                (404, chat_bytes("nobody", more=_FROM_PAGE)),
                (200, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n%b\r\n" % _FROM_PAGE),
                (404, b"GET /nothing HTTP/1.1\r\nHost: x\r\n%b\r\n" % _FROM_PAGE),
                (405, b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n%b\r\n" % _FROM_PAGE),
            ]
            for expected_status, request in requests:
                status, fields, _ = await connection.ask(request)
                assert (status, cors_of(fields)) == (expected_status, expected)
            _, fields, _ = await connection.ask(chat_bytes())
            assert not cors_of(fields), "this one was for no page"
            await in_step(running, connection)

    run(check())


def test_with_a_star_everybody_may(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_ALL) as running:
            connection = await running.connect()
            await connection.send(preflight("/v1/chat/completions", "null"))
            status, fields, _ = await connection.answer("OPTIONS")
            assert (status, fields["access-control-allow-origin"]) == (204, "*")
            assert "vary" not in fields
            assert "access-control-allow-credentials" not in fields
            _, fields, _ = await connection.ask(chat_bytes(more=b"Origin: null\r\n"))
            assert cors_of(fields) == {"access-control-allow-origin": "*", "access-control-expose-headers": "*"}
            await in_step(running, connection)

    run(check())


def test_a_star_lets_no_page_administer(tmp_path: Path) -> None:
    async def stop(_: web.Request) -> web.Response:
        return web.Response(text="stopped")

    async def check() -> None:
        for settings, answers in ((_ALL, {"POST": 403, "GET": 204}), (_NAMED, {"POST": 204, "GET": 204})):
            routes = (web.post("/api/v1/models/m/stop", stop),)
            async with relay(tmp_path, Script(), settings=settings, routes=routes) as running:
                connection = await running.connect()
                for method, status in answers.items():
                    await connection.send(preflight("/api/v1/models/m/stop", method=method))
                    assert (await connection.answer("POST" if status == 403 else "OPTIONS"))[0] == status
                await connection.close()

    run(check())


def test_comments_of_a_loading_model_reach_the_page(tmp_path: Path) -> None:
    async def check() -> None:
        settings = _NAMED._replace(loading_keepalive_s=0.1)
        async with relay(tmp_path, Script(), settings=settings, ready=False) as running:
            running.lifecycle.start_s = 0.5
            connection = await running.connect()
            status, fields, _ = await connection.ask(chat_bytes(more=_FROM_PAGE, stream=True))
            assert (status, fields["access-control-allow-origin"]) == (200, _PAGE)

    run(check())


def test_a_preflight_with_a_body_and_one_without_leave_the_connection_in_step(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_NAMED) as running:
            connection = await running.connect()
            await connection.send(preflight("/v1/models", more="Content-Length: 5\r\n") + b"hello" + chat_bytes())
            assert (await connection.answer("OPTIONS"))[0] == 204
            assert (await connection.answer())[2] == OK
            slow = await running.connect()
            await slow.send(preflight("/v1/models", more="Content-Length: 5\r\n"))
            status, fields, _ = await slow.answer("OPTIONS")
            assert (status, fields["connection"]) == (204, "close"), "nobody waits for its body"
            await in_step(running, connection)

    run(check())


def test_options_that_are_no_preflight_go_where_any_request_goes(tmp_path: Path) -> None:
    async def check() -> None:
        script = Script()
        async with relay(tmp_path, script, settings=_NAMED) as running:
            connection = await running.connect()
            line = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            assert (await connection.ask(line + b"\r\n"))[0] == 405
            assert (await connection.ask(line + _FROM_PAGE + b"\r\n"))[0] == 405
            assert (await connection.ask(line + b"Access-Control-Request-Method: POST\r\n\r\n"))[0] == 405
            await in_step(running, connection)

    run(check())


async def echo(request: web.Request) -> web.WebSocketResponse:
    answers = web.WebSocketResponse()
    await answers.prepare(request)
    async for message in answers:
        await answers.send_str(str(message.data))
    return answers


def test_web_sockets_are_for_pages_that_may_read_and_for_our_own(tmp_path: Path) -> None:
    async def check() -> None:
        async with relay(tmp_path, Script(), settings=_NAMED, routes=(web.get("/echo", echo),)) as running:
            url = f"http://127.0.0.1:{running.port}"
            async with aiohttp.ClientSession() as session:
                for origin in (None, _PAGE, url):
                    async with session.ws_connect(f"{url}/echo", origin=origin) as opened:
                        await opened.send_str("hello")
                        assert await opened.receive_str() == "hello"
                for origin in ("https://evil.example", "null", f"http://127.0.0.1:{running.port + 1}", "http://"):
                    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                        await session.ws_connect(f"{url}/echo", origin=origin)
                    assert refused.value.status == 403
            await until(lambda: not running.handlers)
            await in_step(running)

    run(check())


def test_a_changed_configuration_counts_for_heads_that_are_known(tmp_path: Path) -> None:
    async def check() -> None:
        async with gateway({"m": f"unix:{tmp_path}/none"}) as running:
            connection = await running.connect()
            assert (await connection.ask(preflight("/v1/models")))[0] == 403
            config = running.dispatcher.config._replace(gateway=_NAMED)
            running.dispatcher.reconfigure(config, {}, 1 << 40)
            if running.staff is not None:
                running.staff.configure(config)
                await asyncio.sleep(0.1)
            await connection.send(preflight("/v1/models"))
            assert (await connection.answer("OPTIONS"))[0] == 204

    run(check())


@pytest.mark.parametrize(
    "good", ["*", _PAGE, "http://localhost:3000", "http://[::1]:8080", "vscode-webview://0f-a", "tauri://localhost"]
)
def test_origins_are_as_browsers_write_them(good: str) -> None:
    assert ORIGIN.read(good) == good
    assert cors_lines((good,), good.encode()).startswith(b"Access-Control-Allow-Origin: " + good.encode())
    for bad in (good + "/", good.upper() if good != "*" else "**", good + "\n", good + " ", "app.example", "", 5, None):
        with pytest.raises(BadValueError):
            ORIGIN.read(bad)
