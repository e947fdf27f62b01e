"""Who may do what in the admin API over TCP and on its socket, what the log says of it, and how the keys themselves change."""

import asyncio
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from relay_gateway import Running, Script, relay, run

from mmd.config import AdminAuth, Gateway
from mmd.events import Reloaded, to_json, without_private
from mmd.gateway.admin_access import AdminAccess
from mmd.gateway.application import ApplicationServer
from mmd.gateway.handover import KeysTaken
from mmd.gateway.keeper import Keeper
from mmd.gateway.relay.access import Access
from mmd.gateway.server import Door
from mmd.gateway.snapshot import Snapshot
from mmd.keys import Key, KeyRing, KeyScope, Limit, digest, key_text
from mmd.status import GatewayStatus, ModelState, ModelStatus, Status

ADMIN, USE, READ, WRONG = (key_text(name.ljust(32, b".")) for name in (b"admin", b"use", b"read", b"wrong"))
RING = KeyRing(
    (
        Key("operator", digest(ADMIN.encode()), scope=KeyScope.ADMIN),
        Key("ci", digest(USE.encode()), rate=Limit(5, 60)),
    ),
    3,
)

LOOKED_AT = KeyRing((*RING.keys, Key("scraper", digest(READ.encode()), scope=KeyScope.READ)), RING.serial)


class _Picture:
    """As much of a snapshot as the keeper knows."""

    key_problems: tuple[str, ...] = ()


def keeper_of(access: Access) -> Keeper:
    return Keeper(access, cast("Snapshot", _Picture()))


class Admin:
    """The admin API of a gateway, over TCP and on a socket."""

    def __init__(self, running: Running, keeper: Keeper, port: int, path: Path, session: aiohttp.ClientSession) -> None:
        self.running = running
        self.keeper = keeper
        self.port = port
        self.path = path
        self.done: list[str] = []
        self._session = session

    async def ask(
        self, method: str, path: str, key: str = "", body: bytes = b"", fields: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        headers = dict(fields or {})
        if key:
            headers["Authorization"] = f"Bearer {key}"
        async with self._session.request(
            method, f"http://127.0.0.1:{self.port}{path}", headers=headers, data=body or None
        ) as answer:
            return answer.status, await answer.json()

    async def on_socket(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.path))) as session,
            session.request(method, f"http://localhost{path}", data=body or None) as answer,
        ):
            return answer.status, await answer.json()


@asynccontextmanager
async def administered(
    path: Path, ring: KeyRing = RING, *, auth: AdminAuth = AdminAuth.KEY, workers: int = 0, origins: tuple[str, ...] = ()
) -> AsyncIterator[Admin]:
    settings = Gateway(admin_auth=auth, cors_origins=origins)
    async with relay(path, Script(), keys=ring, workers=workers, settings=settings) as running:
        keeper = keeper_of(running.inference.access)
        keeper.staff = running.staff
        access = AdminAccess(lambda: running.dispatcher.config.gateway)
        done: list[str] = []

        async def answer(request: web.Request) -> web.Response:
            done.append(f"{request.method} {request.path}")
            return web.json_response({})

        routes = [
            web.get("/api/v1/status", answer),
            web.get("/api/v1/logs", answer),
            web.post("/api/v1/models/{name:.+}/start", answer),
            web.post("/api/v1/models/{name:.+}/stop", answer),
            web.post("/api/v1/reload", answer),
            web.delete("/api/v1/models/{name:.+}", answer),
            *(route.definition() for route in keeper.routes()),
        ]
        with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
            unix.bind(str(path / "admin.sock"))
            unix.listen()
            private = ("/api/v1/logs", "/api/v1/keys")
            over_tcp = [access.over_tcp(route, private=route.path in private) for route in routes]
            on_socket = map(access.on_socket, routes)
            inference = running.inference
            servers = (
                ApplicationServer("mmd-admin-tcp", inference, over_tcp, [tcp], door=Door.ADMIN_TCP),
                ApplicationServer("mmd-admin", inference, on_socket, [unix], door=Door.ADMIN_SOCKET),
            )
            for server in servers:
                await server.start()
            async with aiohttp.ClientSession() as session:
                admin = Admin(running, keeper, tcp.getsockname()[1], path / "admin.sock", session)
                admin.done = done
                yield admin
            for server in servers:
                await server.stop_accepting()
                await server.drain(0)


def check(path: Path, body: Callable[[Admin], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def scenario() -> None:
        async with administered(path, **options) as admin:
            await body(admin)

    run(scenario())


_CHANGES = (("POST", "/api/v1/models/demo%2Fm/stop"), ("POST", "/api/v1/reload"), ("DELETE", "/api/v1/models/m"))
_PRIVATE = (("GET", "/api/v1/logs"), ("GET", "/api/v1/keys"))


@pytest.mark.parametrize("ring", [LOOKED_AT, KeyRing()], ids=["keys", "no keys"])
def test_over_tcp_changes_need_a_key_for_administration(tmp_path: Path, ring: KeyRing) -> None:
    async def body(admin: Admin) -> None:
        for method, path in (*_CHANGES, *_PRIVATE):
            for key in ("", USE, READ, WRONG):
                status, said = await admin.ask(method, path, key)
                assert status == (401 if key == WRONG and ring.required else 403), (path, key)
                assert "mmdctl keys add" in said["error"]["message"]
                assert "mmd-" not in said["error"]["message"]
        assert not admin.done
        looking = (
            {"": 401, USE: 403, WRONG: 401, READ: 200, ADMIN: 200} if ring.required else dict.fromkeys(("", USE, READ), 200)
        )
        for key, status in looking.items():
            assert (await admin.ask("GET", "/api/v1/status", key))[0] == status, key
        for method, path in (*_CHANGES, *_PRIVATE):
            assert (await admin.ask(method, path, ADMIN))[0] == (200 if ring.required else 403)

    check(tmp_path, body, ring=ring)


@pytest.mark.parametrize("ring", [RING, KeyRing()], ids=["keys", "no keys"])
def test_open_lets_everybody_change_but_the_pages_of_strangers(tmp_path: Path, ring: KeyRing) -> None:
    async def body(admin: Admin) -> None:
        here = f"127.0.0.1:{admin.port}"
        let_in: tuple[dict[str, str], ...] = (
            {},
            {"Host": "localhost:8001"},
            {"Host": "mmd.localhost"},
            {"Host": "[::1]:8001"},
            {"Host": "192.0.2.7"},
            {"Host": socket.gethostname()},
            {"Origin": f"http://{here}"},
            {"Origin": f"http://{here}", "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
            {"Origin": "https://ui.example.com", "Sec-Fetch-Site": "cross-site"},
            {"Host": "ui.example.com"},
        )
        refused = (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:9"},
            {"Origin": "https://ui.example.com.evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Host": "evil.example", "Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": "[::1"},
            {"Host": ""},
        )
        for method, path in (*_CHANGES, *_PRIVATE):
            for fields in let_in:
                assert (await admin.ask(method, path, fields=fields))[0] == 200, fields
            admin.done.clear()
            for fields in refused:
                assert (await admin.ask(method, path, fields=fields))[0] == 403, fields
            assert not admin.done
        if ring.required:
            assert (await admin.ask("POST", "/api/v1/reload", ADMIN, fields={"Host": "proxy.example"}))[0] == 200, (
                "no page has the key"
            )

    check(tmp_path, body, ring=ring, auth=AdminAuth.OPEN, origins=("https://ui.example.com",))


def test_with_read_nobody_needs_a_key_to_look(tmp_path: Path) -> None:
    async def body(admin: Admin) -> None:
        looking = {"": 200, USE: 200, WRONG: 401, READ: 200, ADMIN: 200}
        for key, status in looking.items():
            assert (await admin.ask("GET", "/api/v1/status", key))[0] == status, key
        for method, path in (*_CHANGES, *_PRIVATE):
            assert (await admin.ask(method, path, READ))[0] == 403

    check(tmp_path, body, ring=LOOKED_AT, auth=AdminAuth.READ)


def test_a_key_to_look_with_is_none_for_inference(tmp_path: Path) -> None:
    async def body(admin: Admin) -> None:
        status, said = await admin.ask("POST", "/v1/chat/completions", READ, b'{"model": "m"}')
        assert (status, said["error"]["code"]) == (403, "use_key_needed")

    check(tmp_path, body, ring=LOOKED_AT)


def test_what_is_private_is_left_out_for_who_may_only_look() -> None:
    model = ModelStatus("m", "m", "sim", ModelState.FAILED, reason="exit 1", tail=("a prompt",))
    shown = Status(GatewayStatus("0", 1, 0.0, problems=("mmd.yaml:1: 'secret' is wrong",)), models=(model,)).without_private()
    assert "prompt" not in str(shown)
    assert "secret" not in str(shown)
    assert shown.models[0].reason == "exit 1"
    event = without_private(Reloaded(0.0, "problems: 'secret'", problems=("'secret' is wrong",)))
    assert "secret" not in str(to_json(event))


def test_the_log_says_who_asked_for_a_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(admin: Admin) -> None:
        await admin.on_socket("POST", "/api/v1/models/demo%2Fm/stop")
        await admin.on_socket("POST", "/api/v1/models/a%1Bb/stop")
        await admin.on_socket("POST", "/api/v1/models/x%2C%20asked%20by%20uid%200/start")
        await admin.on_socket("POST", "/api/v1/reload?secret=1")
        await admin.on_socket("GET", "/api/v1/status")
        await admin.ask("POST", "/api/v1/models/demo%2Fm/start", ADMIN)
        await admin.ask("POST", "/api/v1/models/demo%2Fm/restart", USE)

    with caplog.at_level(logging.INFO, "mmd.gateway.admin_access"):
        check(tmp_path, body)
    assert [record.message for record in caplog.records if record.name == "mmd.gateway.admin_access"] == [
        f"stop demo/m, asked by uid 0 (root), pid {os.getpid()}",
        f"stop 'a\\x1bb', asked by uid 0 (root), pid {os.getpid()}",
        f"start 'x, asked by uid 0', asked by uid 0 (root), pid {os.getpid()}",
        f"POST /api/v1/reload, asked by uid 0 (root), pid {os.getpid()}",
        "start demo/m, asked by the API key operator at 127.0.0.1",
    ]
    assert ADMIN not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_that_are_put_are_in_force_when_it_is_answered(tmp_path: Path, workers: int) -> None:
    async def body(admin: Admin) -> None:
        url = f"http://127.0.0.1:{admin.running.port}/v1/chat/completions"

        async def statuses(key: str) -> set[int]:
            async def status() -> int:
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(url, json={"model": "m"}, headers={"x-api-key": key}) as answer,
                ):
                    return answer.status

            return set(await asyncio.gather(*(status() for _ in range(6))))

        assert await statuses(ADMIN) == {200}
        ring = RING.revoke("operator")
        assert await admin.on_socket("PUT", "/api/v1/keys", ring.render().encode()) == (200, {"serial": 4, "keys": 1})
        assert await statuses(ADMIN) == {401}
        assert (await admin.on_socket("PUT", "/api/v1/keys", ring.render().encode()))[0] == 200, "the same once more"
        status, said = await admin.on_socket("PUT", "/api/v1/keys", RING.render().encode())
        assert (status, said["error"]["code"]) == (409, "keys_are_old")
        status, said = await admin.on_socket("PUT", "/api/v1/keys", b"serial: 9\nkeys: {ci: {sha256: mmd-secret}}")
        assert (status, "api-keys.yaml:2" in said["error"]["message"]) == (400, True)
        assert "secret" not in str(said)
        assert await statuses(ADMIN) == {401}
        assert (await admin.on_socket("GET", "/api/v1/keys"))[1] == {
            "serial": 4,
            "required": True,
            "keys": [{"name": "ci", "scope": "use", "rate": "5/min"}],
        }

    check(tmp_path, body, workers=workers)


def test_over_tcp_nobody_puts_keys(tmp_path: Path) -> None:
    async def body(admin: Admin) -> None:
        for key in (ADMIN, ""):
            status, said = await admin.ask("PUT", "/api/v1/keys", key, KeyRing().render().encode())
            assert (status, said["error"]["code"]) == (403, "keys_are_roots")
        assert admin.running.inference.access.ring == RING

    check(tmp_path, body, auth=AdminAuth.OPEN)


def test_inference_over_the_admin_s_tcp_needs_a_key_and_on_its_socket_none(tmp_path: Path) -> None:
    async def body(admin: Admin) -> None:
        chat = b'{"model": "m"}'
        assert (await admin.ask("POST", "/v1/chat/completions", "", chat))[0] == 401
        assert (await admin.ask("POST", "/v1/chat/completions", USE, chat))[0] == 200
        assert (await admin.on_socket("POST", "/v1/chat/completions", chat))[0] == 200

    check(tmp_path, body)


_GOOD = RING.render()
_BROKEN = _GOOD.replace("scope: admin", "scope: amdin")


@pytest.mark.parametrize(
    ("text", "names", "required", "problem"),
    [
        (None, [], False, ""),
        ("serial: 0", [], False, ""),
        (_GOOD, ["operator", "ci"], True, ""),
        (_BROKEN, ["ci"], True, r"api-keys\.yaml:\d+: keys\.operator\.scope"),
        ("", [], True, "is empty"),
        ("keys: [", [], True, "api-keys.yaml"),
        ("\x00", [], True, "api-keys.yaml"),
    ],
)
def test_the_credential_is_what_counts_at_a_start(
    tmp_path: Path, text: str | None, names: list[str], required: bool, problem: str
) -> None:
    if text is not None:
        (tmp_path / "api-keys.yaml").write_text(text)
    access, picture = Access(), _Picture()

    async def scenario() -> None:
        keeper = Keeper(access, cast("Snapshot", picture))
        keeper.load({"CREDENTIALS_DIRECTORY": str(tmp_path)})
        handed = msgspec.json.decode(msgspec.json.encode(keeper.handed()), type=KeysTaken)
        following = Access()
        after = keeper_of(following)
        after.load({})
        after.inherit(handed)
        assert (following.ring, after.handed()) == (access.ring, handed), "an upgrade changes nothing"

    run(scenario())
    assert ([key.name for key in access.ring.keys], access.required) == (names, required)
    assert bool(picture.key_problems) is bool(problem)
    assert re.search(problem, "\n".join(picture.key_problems))


def test_a_credential_that_cannot_be_read_closes_the_door(tmp_path: Path) -> None:
    (tmp_path / "api-keys.yaml").mkdir()
    access, picture = Access(), _Picture()

    async def scenario() -> None:
        Keeper(access, cast("Snapshot", picture)).load({"CREDENTIALS_DIRECTORY": str(tmp_path)})

    run(scenario())
    assert access.required
    assert "cannot be read" in picture.key_problems[0]


def test_an_upgrade_goes_by_the_keys_in_force_and_what_they_have_used(tmp_path: Path) -> None:
    (tmp_path / "api-keys.yaml").write_text(_GOOD)
    later = RING.revoke("operator")

    async def scenario() -> None:
        access = Access()
        keeper = keeper_of(access)
        keeper.load({"CREDENTIALS_DIRECTORY": str(tmp_path)})
        keeper.inherit(KeysTaken(later.render(), (), {"ci": 1e12, "gone": 5.0}))
        assert access.ring == later
        visitor = access.named("ci")
        assert visitor is not None
        assert visitor.full_at_s == 1e12
        assert keeper.handed().full_at_s == {"ci": 1e12}
        keeper.inherit(None)
        assert access.ring == later, "a gateway that knows of no keys says nothing of them"

    run(scenario())


def test_a_relieved_gateway_goes_by_later_keys_and_takes_none_itself(tmp_path: Path) -> None:
    later = RING.revoke("operator")

    async def body(admin: Admin) -> None:
        keeper, access = admin.keeper, admin.running.inference.access
        keeper.relieved = True
        status, said = await admin.on_socket("PUT", "/api/v1/keys", later.render().encode())
        assert (status, said["error"]["code"]) == (503, "gateway_replaced"), "its successor would never know of them"
        assert access.ring == RING
        keeper.follow(later.render())
        assert access.ring == later
        assert (await admin.ask("GET", "/api/v1/logs", ADMIN))[0] == 401
        keeper.follow(RING.render())
        assert access.ring == later, "earlier ones that were long under way"

    check(tmp_path, body)
