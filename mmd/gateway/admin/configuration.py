"""The configuration: in effect, checked, and read again.

A check is `mmdctl check` in a process of its own: what it is given may take any time and memory, and must take neither from
those who are served.
"""

import asyncio
import contextlib
import os
import resource
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import msgspec
from aiohttp import web

from mmd.answers import Changes, Checked
from mmd.build import render
from mmd.gateway.admin.route import ApiResponse, Body, Route, as_json
from mmd.gateway.api_error import ApiError
from mmd.gateway.channel import in_memory
from mmd.gateway.dispatcher import Dispatcher
from mmd.scope import Scope, ScopeKind
from mmd.secrecy import HIDDEN
from mmd.yamlfile import parse

__all__ = ["ConfigurationRoutes"]

_CHECK: Final = (sys.executable, "-I", "-m", "mmd.ctl.main")
_CHECK_WITHIN_S: Final = 20.0
_CHECKS_MAX: Final = 2
_CHECK_BYTES: Final = 512 << 20
"""Address space of a check, several times what the largest configuration takes (mmd.yamlfile)."""
_YAML: Final = ("application/yaml", "text/plain", "application/json")

Reload = Callable[[], Awaitable[dict[str, list[str]]]]


class ConfigurationRoutes:
    def __init__(self, dispatcher: Dispatcher, scope: Scope, reload: Reload) -> None:
        """`reload` reads the configuration again and answers what changed."""
        self._dispatcher = dispatcher
        self._scope = scope
        self._reload = reload
        self._checks = 0

    def routes(self) -> list[Route]:
        return [
            Route(
                "GET",
                "/api/v1/config",
                self.config,
                "The configuration in effect",
                ApiResponse(
                    "As mmd.yaml(5), defaults and profiles merged in; values of `env` are hidden, `secrets` are files.",
                    dict[str, Any],
                ),
                private=True,
            ),
            Route(
                "POST",
                "/api/v1/config/check",
                self.check,
                "Check a configuration",
                ApiResponse("What is wrong with it.", Checked),
                body=Body("A whole mmd.yaml, in YAML; without it, the installed files are checked.", Any, _YAML),
                errors=(413, 415, 429, 503),
            ),
            Route(
                "POST",
                "/api/v1/reload",
                self.reload,
                "Read the configuration again",
                ApiResponse("What that changed.", Changes),
                description="systemd is not told to read the units again: `mmdctl reload` does both.",
            ),
        ]

    async def config(self, _: web.Request) -> web.Response:
        shown = parse(render(self._dispatcher.config), self._scope.config_file).value
        for model in shown["models"].values():
            if "env" in model:
                model["env"] = dict.fromkeys(model["env"], HIDDEN)
        return as_json(shown)

    async def reload(self, _: web.Request) -> web.Response:
        changes = await self._reload()
        return as_json(Changes(**{kind: tuple(names) for kind, names in changes.items()}))

    async def check(self, request: web.Request) -> web.Response:
        text = await request.read()
        if text and "Content-Type" in request.headers and request.content_type not in _YAML:
            message = f"a configuration is YAML, not {request.content_type}: Content-Type: application/yaml"
            raise ApiError(415, message, code="unsupported_media_type")
        if self._checks >= _CHECKS_MAX:
            raise ApiError(429, f"{_CHECKS_MAX} checks are under way already", code="too_many_checks", retry_after_s=2)
        self._checks += 1
        try:
            if not text:
                return as_json(await self._check())
            memory = in_memory(text)
            try:
                return as_json(await self._check(memory))
            finally:
                os.close(memory)
        finally:
            self._checks -= 1

    async def _check(self, memory: int | None = None) -> Checked:
        """Of the text in a memory file, else of the installed files."""
        user = ("--user",) if self._scope.kind is ScopeKind.USER else ()
        fds = () if memory is None else (memory,)
        files = [f"/proc/self/fd/{fd}" for fd in fds]
        words = (*_CHECK, *user, "check", "--json", *files)
        process = await asyncio.create_subprocess_exec(*words, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, pass_fds=fds)
        with contextlib.suppress(OSError):  # it has ended already
            resource.prlimit(process.pid, resource.RLIMIT_AS, (_CHECK_BYTES, _CHECK_BYTES))
        text = await _output(process)
        try:
            checked = msgspec.json.decode(text, type=Checked)
        except msgspec.DecodeError as error:
            raise ApiError(503, "the check ended without a result", code="check_failed", retry_after_s=1) from error
        if memory is None:
            return checked
        problems, warnings = (
            tuple(replace(each, file="mmd.yaml") for each in found) for found in (checked.problems, checked.warnings)
        )
        return replace(checked, problems=problems, warnings=warnings)


async def _output(process: Process) -> bytes:
    """What it prints; it ends in any case."""
    try:
        async with asyncio.timeout(_CHECK_WITHIN_S):
            text, _ = await process.communicate()
            return text
    except TimeoutError:
        raise ApiError(503, f"the check took longer than {_CHECK_WITHIN_S:g} s", code="check_failed") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
