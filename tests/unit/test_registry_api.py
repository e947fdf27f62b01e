"""POST /api/v1/models and DELETE /api/v1/models/NAME: what they answer, over the real relay, with and without workers."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web
from config_watch import ConfigWatch
from relay_gateway import Running, Script, chat_bytes, engine, gateway, ok_answer, run, until

from mmd.gateway.admin import registry as registry_routes
from mmd.gateway.admin.registry import RegistryRoutes
from mmd.gateway.gauges import Gauges
from mmd.gateway.memory import Memory
from mmd.gateway.snapshot import Snapshot
from mmd.names import CPU, UnitName
from mmd.policy.events import Verify
from mmd.scope import Scope

_SETTINGS = {"engine": "sim", "gpus": 0}


class Registry:
    """A gateway whose configuration is in a folder that is watched."""

    def __init__(self, running: Running, scope: Scope) -> None:
        self.running = running
        self.scope = scope
        self.watch = ConfigWatch(running.dispatcher, running.staff, scope)

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        connection = await self.running.connect()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        status, _, content = await connection.ask(head.encode() + data)
        await connection.close()
        return status, json.loads(content)

    async def chat(self, model: str) -> int:
        connection = await self.running.connect()
        status, _, _ = await connection.ask(chat_bytes(model).replace(b"Host: x", b"Host: localhost"))
        await connection.close()
        return status


@asynccontextmanager
async def registry(tmp_path: Path, *, workers: int = 0, scope: Scope | None = None) -> AsyncIterator[Registry]:
    scope = (scope or Scope.user({}))._replace(config_dir=tmp_path / "config", runtime_dir=tmp_path)
    (scope.config_dir / "models.d").mkdir(parents=True)
    scope.config_file.write_text("models: {m: {engine: sim, gpus: 0}}\n")
    apis: list[RegistryRoutes] = []

    async def add(request: web.Request) -> web.StreamResponse:
        return await apis[0].add(request)

    async def remove(request: web.Request) -> web.StreamResponse:
        return await apis[0].remove(request)

    async with engine(tmp_path / "engine.sock", Script(*[ok_answer()] * 20)) as endpoint:
        routes = (web.post("/api/v1/models", add), web.delete("/api/v1/models/{name:.+}", remove))
        async with gateway({"m": endpoint}, routes=routes, workers=workers) as running:
            running.lifecycle.endpoints |= dict.fromkeys(("new", "other"), endpoint)
            snapshot = Snapshot(running.dispatcher, cast("Memory", None), cast("Gauges", None), scope="user")
            apis.append(RegistryRoutes(running.dispatcher, snapshot, scope))
            found = Registry(running, scope)
            watch = asyncio.ensure_future(found.watch.watch())
            try:
                yield found
            finally:
                watch.cancel()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_is_added_used_and_removed(tmp_path: Path, workers: int) -> None:
    async def scenario() -> None:
        async with registry(tmp_path, workers=workers) as found:
            assert await found.chat("new") == 404
            status, answer = await found.ask("POST", "/api/v1/models", {"name": "new", **_SETTINGS, "aliases": ["fresh"]})
            assert status == 201, answer
            assert [(model["name"], model["state"]) for model in answer["models"]] == [("new", "pending")]
            assert answer["files"] == [str(found.scope.config_dir / "models.d/new.yaml")]
            assert await found.chat("fresh") == 200
            assert await found.chat("m") == 200
            status, answer = await found.ask("DELETE", "/api/v1/models/fresh")
            assert (status, answer["model"]) == (200, "new")
            await until(lambda: UnitName("new", CPU) not in found.running.dispatcher.scheduler.state.instances)
            assert await found.chat("new") == 404
            assert await found.chat("m") == 200

    run(scenario())


def test_a_trial_asked_for_starts_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with registry(tmp_path) as found:
            await found.ask("POST", "/api/v1/models", {"name": "new", **_SETTINGS})
            found.running.dispatcher.post(Verify("new"))
            await until(lambda: UnitName("new", CPU) in found.running.dispatcher.scheduler.state.instances)

    run(scenario())


def test_several_are_replaced_or_none_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with registry(tmp_path) as found:
            both = {"models": {"new": _SETTINGS, "other": _SETTINGS}}
            assert (await found.ask("POST", "/api/v1/models", both))[0] == 201
            status, answer = await found.ask("POST", "/api/v1/models", both)
            assert (status, answer["error"]["code"]) == (409, "model_exists")
            both["models"]["new"] = {**_SETTINGS, "description": "changed"}
            status, answer = await found.ask("POST", "/api/v1/models?replace=true", both)
            assert [model["description"] for model in answer["models"]] == ["changed", ""]

    run(scenario())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 99_999, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "must be an object"),
        (b"{}", "must be an object"),
        (b'{"name": 1}', "must be an object"),
        (b'{"name": "x", "models": {}}', "must be an object"),
        (b'{"models": {}, "other": 1}', "must be an object"),
        (b'{"models": {}}', "there is no model in it"),
        (b'{"name": "x", "vrma": "1GiB"}', "models.x.vrma: unknown key"),
        (b'{"name": "x", "engine": "sim", "vram": NaN}', "models.x.vram"),
        (b'{"name": "\\ud800", "engine": "sim", "gpus": 0, "id": "x"}', "YAML cannot say"),
        (b'{"name": "", "engine": "sim", "gpus": 0}', "no unit id"),
    ],
)
def test_what_is_no_model_is_a_400(tmp_path: Path, body: bytes, words: str) -> None:
    async def scenario() -> None:
        async with registry(tmp_path) as found:
            status, answer = await found.ask("POST", "/api/v1/models", body)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
            assert words in answer["error"]["message"]
            assert not list((found.scope.config_dir / "models.d").iterdir())

    run(scenario())


def test_what_cannot_be_removed_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with registry(tmp_path) as found:
            status, answer = await found.ask("DELETE", "/api/v1/models/m")
            assert (status, answer["error"]["code"]) == (409, "model_shared")
            assert "mmd.yaml:1" in answer["error"]["message"]
            assert (await found.ask("DELETE", "/api/v1/models/nobody"))[0] == 404
            await found.ask("POST", "/api/v1/models", {"name": "new", **_SETTINGS, "lora": {"sql": "/srv/sql"}})
            status, answer = await found.ask("DELETE", "/api/v1/models/sql")
            assert (status, answer["error"]["code"]) == (409, "model_shared")
            assert "sql is an adapter of new" in answer["error"]["message"]
            assert "new" in found.running.dispatcher.config.models
            status, answer = await found.ask("DELETE", "/api/v1/models/m?force=perhaps")
            assert (status, answer["error"]["param"]) == (400, "force")

    run(scenario())


def test_what_does_not_come_into_use_is_said_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_routes, "_IN_USE_WITHIN_S", 0.1)

    async def scenario() -> None:
        async with registry(tmp_path) as found:
            found.watch.on = False
            status, answer = await found.ask("POST", "/api/v1/models", {"name": "new", **_SETTINGS})
            assert (status, answer["error"]["code"]) == (504, "not_in_use")
            assert "models.d/new.yaml is changed, but not in use yet" in answer["error"]["message"]

    run(scenario())


def test_a_registrar_that_is_not_there_or_breaks_off(tmp_path: Path) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def scenario() -> None:
        async with registry(tmp_path, scope=Scope.system()) as found:
            body = {"name": "new", **_SETTINGS}
            status, answer = await found.ask("POST", "/api/v1/models", body)
            assert (status, answer["error"]["code"]) == (503, "no_registrar")
            assert "systemctl start mmd-registrar.socket" in answer["error"]["message"]
            server = await asyncio.start_unix_server(hang_up, found.scope.registrar_socket)
            status, answer = await found.ask("POST", "/api/v1/models", body)
            server.close()
            assert (status, answer["error"]["code"]) == (503, "model_unwritable")
            assert "the registrar broke off" in answer["error"]["message"]
            assert list((found.scope.config_dir / "models.d").iterdir()) == []

    run(scenario())
