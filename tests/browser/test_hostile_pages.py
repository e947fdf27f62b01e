"""Hostile pages in a real browser: those of other origins, of rebound names, and of engines (`tests/run --browser`)."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from admin_gateway import administered
from aiohttp import web
from chromium import EVIL, Pages, served, shown, visit
from relay_gateway import Running, Script, gateway, outer_address, run

from mmd.config import EngineKind, Gateway, Model
from mmd.gateway.port_server import PortServer
from mmd.gateway.server import Door

pytestmark = pytest.mark.browser

_MODELS = (
    Model("prog", "prog", EngineKind.COMMAND, gpus=0),
    Model("other", "other", EngineKind.COMMAND, gpus=0),
    Model("sleepy", "sleepy", EngineKind.SIM, gpus=0),
)


class Program:
    """An engine of one's own (`engine: command`): answers any path, and keeps which ones it was asked for."""

    def __init__(self, page: str = "") -> None:
        self.asked: set[str] = set()
        self.page = page

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.add(request.path)
        if request.headers.get("Upgrade") == "websocket":
            opened = web.WebSocketResponse()
            await opened.prepare(request)
            await opened.send_str("the program's secret")
            await opened.close()
            return opened
        if request.path == "/page":
            cookie = {"Set-Cookie": "header=1; Max-Age=600"}
            return web.Response(text=self.page, content_type="text/html", headers=cookie)
        if request.path == "/script":
            return web.Response(text="window.secret = true", content_type="text/javascript")
        return web.json_response({"secret": request.path})


@asynccontextmanager
async def programs(
    path: Path, program: Program, settings: Gateway, workers: int = 0, host: str = "127.0.0.1"
) -> AsyncIterator[Running]:
    """A gateway with _MODELS: all are the program, and `prog` has been started."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", program.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path / "engine.sock")).start()
    endpoints = {model.id: f"unix:{path}/engine.sock" for model in _MODELS}
    routes = (web.get("/own", _own_page),)
    try:
        async with gateway(
            endpoints, models=_MODELS, settings=settings, ready=("prog",), workers=workers, routes=routes, host=host
        ) as running:
            yield running
    finally:
        await runner.cleanup()


# Whatever a page can do without leave. Each way asks for a path of its own; what a page reads goes into the report.
_ATTACKS = """<!doctype html><title>evil</title><body><iframe name="target"></iframe><script>
const api = "http://HOST:PORT", up = api + "/upstream/prog/";
const text = JSON.stringify({model: "sleepy", messages: [{role: "user", content: "x"}]});
const plain = {method: "POST", headers: {"Content-Type": "text/plain"}, body: text};
const soon = () => new Promise(done => setTimeout(done, 400));
const loads = (kind, more) => new Promise(done => {
  const made = Object.assign(document.createElement(kind), more);
  made.onload = made.onerror = () => done();
  document.body.append(made);
  setTimeout(done, 1500);
});
const attacks = {
  chat: async () => (await fetch(api + "/v1/chat/completions", plain)).text(),
  blind: async () => (await fetch(up + "blind", {...plain, mode: "no-cors"})).text(),
  models: async () => (await fetch(api + "/v1/models")).text(),
  get: async () => (await fetch(up + "get", {mode: "no-cors", referrerPolicy: "no-referrer"})).text(),
  cold: async () => (await fetch(api + "/upstream/other/cold", {mode: "no-cors"})).text(),
  beacon: async () => { navigator.sendBeacon(up + "beacon", text); await soon(); },
  async form() {
    const form = Object.assign(document.createElement("form"),
      {method: "post", action: up + "form", enctype: "text/plain", target: "target"});
    form.append(Object.assign(document.createElement("input"), {name: text, value: ""}));
    document.body.append(form);
    form.submit();
    await soon();
  },
  image: () => loads("img", {src: up + "image", referrerPolicy: "no-referrer"}),
  async script() { await loads("script", {src: up + "script"}); return window.secret ? "secret" : ""; },
  style: () => loads("link", {rel: "stylesheet", href: up + "style"}),
  async frame() {
    const frame = Object.assign(document.createElement("iframe"), {src: up + "frame"});
    document.body.append(frame);
    await soon();
    return frame.contentDocument ? frame.contentDocument.body.textContent : "";
  },
  async popup() {
    const opened = window.open(up + "popup", "_blank");
    await soon();
    return opened ? opened.document.body.textContent : "";
  },
  events: () => new Promise(done => {
    const events = new EventSource(up + "events");
    events.onerror = () => { events.close(); done(); };
  }),
  socket: () => socket("/upstream/prog/socket"),
  realtime: () => socket("/v1/realtime?model=prog"),
};
const socket = path => new Promise(done => {
  const opened = new WebSocket(api.replace("http", "ws") + path);
  opened.onmessage = message => done(message.data);
  opened.onerror = opened.onclose = () => done("");
});
(async () => {
  const report = {origin: location.origin, read: []};
  for (const [name, attack] of Object.entries(attacks)) {
    const read = await attack().catch(() => "");
    if (read) report.read.push(name);
  }
  await fetch("/report", {method: "POST", body: JSON.stringify(report)});
})();
</script>"""

_REACHABLE = frozenset(
    {
        *("/blind", "/get", "/cold", "/beacon", "/form", "/image", "/script", "/style", "/frame", "/popup", "/events"),
        *("/socket", "/v1/realtime"),
    }
)


@pytest.mark.parametrize("workers", [0, 2], ids=["alone", "workers"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_origin_starts_and_reaches_and_reads_nothing(tmp_path: Path, host: str, workers: int) -> None:
    async def check() -> None:
        program, pages = Program(), Pages(_ATTACKS.replace("HOST", host))
        async with programs(tmp_path, program, Gateway(), workers) as running, served(pages) as port:
            pages.api_port = running.port
            for number, name in enumerate((EVIL, "127.0.0.1")):  # of another site, and of another port
                told = await visit(pages, tmp_path / str(number), f"http://{name}:{port}/")
                assert told == {"origin": f"http://{name}:{port}", "read": []}
            assert program.asked == set()
            assert running.lifecycle.actions == []
            assert running.in_flight == 0

    run(check())


def test_the_same_page_does_all_of_it_where_every_origin_may(tmp_path: Path) -> None:
    """What the test above relies on: each of these ways leads to the program unless the gateway refuses."""

    async def check() -> None:
        program, pages = Program(), Pages(_ATTACKS.replace("HOST", "127.0.0.1"))
        settings = Gateway(cors_origins=("*",))
        async with programs(tmp_path, program, settings) as running, served(pages) as port:
            pages.api_port = running.port
            told = await visit(pages, tmp_path / "profile", f"http://{EVIL}:{port}/")
            assert program.asked == _REACHABLE | {"/v1/chat/completions"}
            assert {"chat", "models", "script", "socket", "realtime"} <= set(told["read"])
            assert {action.unit.id for action in running.lifecycle.actions} == {"other", "sleepy"}

    run(check())


# Pages by a name of their own that leads to the gateway.

_REBOUND = """<!doctype html><title>evil</title><script>
const body = JSON.stringify({model: "m", messages: []});
const ask = (path, init) => fetch(path, init).then(answer => answer.status, failure => failure.name);
(async () => {
  const report = {origin: location.origin};
  for (const path of PATHS) report[path] = await ask(path);
  report.chat = await ask("/v1/chat/completions", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  report.reload = await ask("/api/v1/reload", {method: "POST"});
  await fetch("http://127.0.0.1:PORT/report", {method: "POST", mode: "no-cors", body: JSON.stringify(report)});
})();
</script>"""


@asynccontextmanager
async def rebound(first: int, then: int) -> AsyncIterator[int]:
    """The port of a name that leads to the port `first` for the page itself, and to `then` for all that the page asks for."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        opened = [writer]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            page = head.startswith(b"GET / ")
            answers, there = await asyncio.open_connection("127.0.0.1", first if page else then)
            opened.append(there)
            there.write(head.replace(b"keep-alive", b"close") if page else head)
            await asyncio.gather(_pump(reader, there), _pump(answers, writer))
        for each in opened:
            each.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("door", [Door.API, Door.ADMIN_TCP], ids=["listen", "admin_listen"])
@pytest.mark.parametrize("hosts", [(), (EVIL,)], ids=["rebound", "named in gateway.hosts"])
def test_a_page_of_a_rebound_name_reads_nothing(tmp_path: Path, door: Door, hosts: tuple[str, ...]) -> None:
    async def check() -> None:
        script = Script()
        async with administered(tmp_path, script, door=door, settings=Gateway(hosts=hosts)) as there:
            looks = [each.path for each in there.api.routes if each.method == "GET" and "{" not in each.path]
            paths = ["/v1/models", "/upstream/m/v1/models", "/metrics", *looks]
            assert {"/api/v1/status", "/api/v1/requests", "/api/v1/events"} <= set(paths)
            if hosts:  # what the test relies on
                paths = ["/v1/models", "/api/v1/status"]
            pages = Pages(_REBOUND.replace("PATHS", json.dumps(paths)))
            async with served(pages) as port:
                pages.api_port = port
                async with rebound(port, there.running.port) as own:
                    told = await visit(pages, tmp_path / "profile", f"http://{EVIL}:{own}/")
            assert told.pop("origin") == f"http://{EVIL}:{own}"
            if hosts:
                assert (told["/v1/models"], told["/api/v1/status"], told["chat"]) == (200, 200, 200)
                return
            assert told == dict.fromkeys([*paths, "chat", "reload"], 403)
            assert not script.requests
            assert not there.running.lifecycle.actions

    run(check())


# Pages of engines.

_ENGINE_PAGE = """<!doctype html><title>engine</title><script>
document.cookie = "script=1; max-age=600";
const ask = (url, init) => fetch(url, init).then(answer => answer.status, failure => failure.name);
const post = {method: "POST", headers: {"Content-Type": "text/plain"}, body: '{"model": "sleepy", "messages": []}'};
(async () => {
  const report = {engine: self.origin, cookie: document.cookie};
  report.own = await ask("/v1/models");
  report.posted = await ask("/form", post);
  report.gateway = await ask("http://127.0.0.1:GATEWAY/v1/models");
  report.driven = await ask("http://127.0.0.1:GATEWAY/v1/chat/completions", post);
  await ask("http://127.0.0.1:GATEWAY/upstream/other/driven", {mode: "no-cors"});
  await ask("http://127.0.0.1:GATEWAY/v1/chat/completions", {...post, mode: "no-cors"});
  await fetch("http://127.0.0.1:PAGES/REPORT", {method: "POST", mode: "no-cors", body: JSON.stringify(report)});
})();
</script><body>the engine's<img crossorigin src="http://127.0.0.1:PAGES/seen">"""

# Opens the engine's page, in a tab and in a frame. It is of the same host, so it sees the same cookies.
_WATCHER = """<!doctype html><title>watcher</title><body><iframe src="ENGINE"></iframe><script>
window.open("ENGINE", "_blank");
(async () => {
  while (await (await fetch("/seen/count")).json() < 2) await new Promise(done => setTimeout(done, 100));
  await new Promise(done => setTimeout(done, 500));
  await fetch("/report", {method: "POST", body: JSON.stringify({cookie: document.cookie})});
})();
</script>"""


def _engine_page(running: Running, pages: Pages, report: str) -> str:
    return _ENGINE_PAGE.replace("GATEWAY", str(running.port)).replace("PAGES", str(pages.own_port)).replace("REPORT", report)


@asynccontextmanager
async def own_port(running: Running) -> AsyncIterator[str]:
    """The origin of the port of `prog`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = PortServer("mmd-port-prog", running.inference, [listening], "prog")
        await server.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            await server.stop_accepting()
            await server.drain(0)


def test_an_engine_s_page_runs_scripts_and_sets_cookies_at_its_own_port_alone(tmp_path: Path) -> None:
    async def check() -> None:
        settings = Gateway(cors_origins=("*",))  # so that the watcher may open it
        async with programs(tmp_path, program := Program(), settings) as running, own_port(running) as port:
            beside = f"http://127.0.0.1:{running.port}/upstream/prog"
            for number, (engine, origin, cookies) in enumerate(
                ((beside, "null", set()), (port, port, {"header=1", "script=1"}))
            ):
                pages = Pages(_WATCHER.replace("ENGINE", f"{engine}/page"))
                program.asked.clear()
                async with served(pages) as own:
                    program.page = _engine_page(running, pages, "")
                    told = await visit(pages, tmp_path / str(number), f"http://127.0.0.1:{own}/")
                assert set(filter(None, told["cookie"].split("; "))) == cookies
                assert set(pages.seen) == {origin}, "of the engine's page, as its image tells"
                assert ("/form" in program.asked) == bool(cookies), "its scripts ran"

    run(check())


def test_an_engine_s_page_works_at_its_own_port_and_cannot_drive_the_gateway(tmp_path: Path) -> None:
    async def check() -> None:
        program, pages = Program(), Pages("")
        async with programs(tmp_path, program, Gateway()) as running, own_port(running) as engine, served(pages):
            program.page = _engine_page(running, pages, "report")
            told = await visit(pages, tmp_path / "profile", f"{engine}/page")
            assert pages.seen == [engine]
            assert set(told.pop("cookie").split("; ")) == {"header=1", "script=1"}
            assert told == {"engine": engine, "own": 200, "posted": 200, "gateway": "TypeError", "driven": "TypeError"}
            assert {"/page", "/v1/models", "/form"} <= program.asked <= {"/page", "/v1/models", "/form", "/favicon.ico"}
            assert running.lifecycle.actions == []

    run(check())


# Those who may.

_OWN = """<!doctype html><title>own</title><script>
const ask = (url, init) => fetch(url, init).then(answer => answer.status, failure => failure.name);
(async () => {
  const body = '{"model": "prog", "messages": []}', report = {};
  report.models = await ask("/v1/models");
  report.chat = await ask("/v1/chat/completions", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  report.upstream = await ask("/upstream/prog/x");
  await fetch("http://127.0.0.1:" + location.hash.slice(1) + "/report",
    {method: "POST", mode: "no-cors", body: JSON.stringify(report)});
})();
</script>"""


async def _own_page(_: web.Request) -> web.Response:
    return web.Response(text=_OWN, content_type="text/html")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_of_the_gateway_s_own_origin_may_call(tmp_path: Path, name: str) -> None:
    async def check() -> None:
        program, pages = Program(), Pages("")
        async with programs(tmp_path, program, Gateway()) as running, served(pages) as port:
            told = await visit(pages, tmp_path / "profile", f"http://{name}:{running.port}/own#{port}")
            assert told == {"models": 200, "chat": 200, "upstream": 200}
            assert program.asked == {"/v1/chat/completions", "/x"}

    run(check())


def test_who_types_the_address_gets_an_answer(tmp_path: Path) -> None:
    async def check() -> None:
        async with programs(tmp_path, Program(), Gateway()) as running:
            assert '"sleepy"' in await shown(tmp_path / "a", f"http://127.0.0.1:{running.port}/v1/models")
            assert '"ok"' in await shown(tmp_path / "b", f"http://localhost:{running.port}/health")
            assert "/upstream-asked" in await shown(
                tmp_path / "c", f"http://localhost:{running.port}/upstream/prog/upstream-asked"
            )
            assert "hosts: [evil.example]" in await shown(tmp_path / "d", f"http://{EVIL}:{running.port}/v1/models")

    run(check())


_OUTER = """<!doctype html><title>evil</title><body><script>
const up = "http://HOST:PORT/upstream/prog/", api = "http://HOST:PORT/v1/chat/completions";
const post = {method: "POST", mode: "no-cors", referrerPolicy: "no-referrer", body: '{"model": "sleepy", "messages": []}'};
const quiet = promise => promise.then(answer => answer.text(), () => "");
(async () => {
  const report = {read: ""};
  for (const src of [up + "image", up.replace("prog", "other") + "cold"])
    await new Promise(done => {
      const image = Object.assign(new Image(), {src, referrerPolicy: "no-referrer"});
      image.onload = image.onerror = done;
    });
  for (const url of [api, up + "post"]) report.read += await quiet(fetch(url, post));
  report.read += await quiet(fetch(up + "get"));
  await new Promise(done => {
    const opened = new WebSocket(up.replace("http", "ws") + "socket");
    opened.onclose = done;
    opened.onmessage = message => { report.read += message.data; };
  });
  await fetch("/report", {method: "POST", body: JSON.stringify(report)});
})();
</script>"""


def test_at_an_outer_address_without_tls_only_gets_that_name_no_page_go_through(tmp_path: Path) -> None:
    """Browsers send Sec-Fetch-Site to loopback and over TLS only (Fetch Metadata, 2; Secure Contexts, 3.1)."""

    async def check() -> None:
        host = outer_address()
        program, pages = Program(), Pages(_OUTER.replace("HOST", host))
        async with programs(tmp_path, program, Gateway(), host=host) as running, served(pages) as port:
            pages.api_port = running.port
            told = await visit(pages, tmp_path / "profile", f"http://{EVIL}:{port}/")
            assert told == {"read": ""}
            assert program.asked == {"/image", "/cold"}
            assert [action.unit.id for action in running.lifecycle.actions] == ["other"]

    run(check())
