"""The admin API against its own OpenAPI document, by schemathesis: what the document allows is answered as it says, what it
does not is refused, and nothing is an internal error."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest
from admin_gateway import Administered, with_admin
from config_watch import ConfigWatch
from relay_gateway import Script

from mmd.scope import Scope

# Of the methods that a path may not take. TRACE the relay does not know at all, and says so: 501.
_CONFIG = """
[phases.coverage]
unexpected-methods = ["GET", "PUT", "POST", "DELETE", "OPTIONS", "PATCH"]

# The document does not say what is right for a model: that is in mmd.yaml(5), and what is wrong gets 400.
[[operations]]
include-name = "POST /api/v1/models"
checks.positive_data_acceptance.expected-statuses = ["201", "400", "409"]
"""
_EXAMPLES = 10


@pytest.mark.timeout(120)
def test_the_api_is_as_its_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "schemathesis.toml").write_text(_CONFIG)
    journalctl = tmp_path / "journalctl"
    journalctl.write_text("#!/bin/sh\n")
    journalctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "admin_hooks", "PYTHONPATH": here}

    scope = Scope.user({})._replace(config_dir=tmp_path / "config", runtime_dir=tmp_path)
    (scope.config_dir / "models.d").mkdir(parents=True)
    scope.config_file.write_text("models: {m: {engine: sim, gpus: 0}, demo/llama 8b: {engine: sim, gpus: 0}}\n")

    async def check(admin: Administered) -> None:
        watch = asyncio.ensure_future(ConfigWatch(admin.running.dispatcher, None, scope).watch())
        url = f"http://127.0.0.1:{admin.running.port}/api/v1/openapi.json"
        options = ["--max-examples", str(_EXAMPLES), "--generation-deterministic", "--request-timeout", "20", "--no-color"]
        program = ["-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml"), "run", url, *options]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *program, stdout=PIPE, stderr=STDOUT, env=environment, cwd=tmp_path
        )
        try:
            async with asyncio.timeout(100):
                told, _ = await process.communicate()
        finally:
            watch.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode == 0, told.decode()
        selected = len(admin.api.routes) - 1  # the document itself is where it begins
        assert f"Selected: {selected}/{selected}" in told.decode()
        assert f"Tested: {selected}" in told.decode()

    with_admin(tmp_path, Script(), check, scope=scope)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
