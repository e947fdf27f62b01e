"""Weights from a hub: fetched by a unit of their own, read by an engine that has no network and cannot change them."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from client import chat
from fake_hub import COMMIT, FakeHub, fake_hub
from testbed import Installation

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}

# In the place of an environment's python: it finds the weights as an offline vLLM does, and tries to change them.
PYTHON = r"""#!/usr/bin/python3
import json, os, pathlib, socket, socketserver, sys
from http.server import BaseHTTPRequestHandler
model, path = (sys.argv[sys.argv.index(option) + 1] for option in ("--model", "--uds"))
folder = pathlib.Path(os.environ["HF_HUB_CACHE"], "models--" + model.replace("/", "--"))
snapshot = folder / "snapshots" / (folder / "refs/main").read_text()
def attempt(what):
    try:
        return repr(what())
    except OSError as error:
        return type(error).__name__ if type(error) is not OSError else os.strerror(error.errno)
weights = snapshot / "model.safetensors"
port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
found = {
    "weights": len(weights.read_bytes()),
    "change": attempt(lambda: weights.write_bytes(b"")),
    "replace": attempt(weights.unlink),
    "plant": attempt(lambda: (folder / "snapshots/x").mkdir()),
    "variables": {name: os.environ.get(name, "") for name in ("HF_HOME", "HF_HUB_OFFLINE", "PYTHONSAFEPATH")},
    "outside": attempt(lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.5)),
}
pathlib.Path(path).with_name("found.json").write_text(json.dumps(found))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET
    address_string = lambda self: "unix"
    log_message = lambda self, *words: None
os.umask(0o007)
socketserver.UnixStreamServer(path, Handler).serve_forever()
"""


@pytest.fixture
def hub(installed: Installation) -> Iterator[FakeHub]:
    with fake_hub("org/model", FILES) as hub:
        installed.run("sh", "-c", "rm -rf /var/cache/mmd/huggingface/hub*")
        installed.write("/opt/venv/bin/python", PYTHON, mode=0o755)
        installed.run("ip", "address", "replace", "192.0.2.1/32", "dev", "lo")
        configure(installed, hub)
        yield hub
        installed.stop_all()


def configure(installed: Installation, hub: FakeHub) -> None:
    env = json.dumps({"HF_ENDPOINT": hub.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    models = f"{{org/model: {{id: fetched, engine: vllm, venv: /opt/venv, gpus: 0, env: {env}}}}}"
    installed.configure(f"gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}\nmodels: {models}\n")


def found(installed: Installation) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(installed.read("/run/mmd-model/fetched@cpu/found.json"))
    return text


def test_weights_come_before_the_engine(installed: Installation, hub: FakeHub) -> None:
    with socket.create_server(("192.0.2.1", 80)):
        assert chat("org/model").status == 200
    seen = found(installed)
    assert seen["weights"] == len(FILES["model.safetensors"])
    assert [seen[what] for what in ("change", "replace", "plant")] == ["Read-only file system"] * 3
    assert seen["outside"] == "TimeoutError"
    assert seen["variables"] == {
        "HF_HOME": "/var/cache/mmd/models/fetched/huggingface",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
    }
    snapshot = f"/var/cache/mmd/huggingface/hub-*/models--org--model/snapshots/{COMMIT}"  # of this hub alone
    stat = installed.run("sh", "-c", f"stat -L --format='%a %U' {snapshot}/config.json").stdout
    assert stat == "644 mmd-fetch\n"
    asked = len(hub.asked)
    installed.ctl("stop", "org/model")
    assert chat("org/model").status == 200
    assert len(hub.asked) == asked, "the hub is not needed again"


def test_a_client_is_told_why_nothing_was_fetched(installed: Installation, hub: FakeHub) -> None:
    hub.token = "secret"
    answer = chat("org/model")
    assert answer.status == 503
    assert "its weights could not be fetched" in answer.error["message"]
    assert "HTTP status 401 (no such model, or one that needs a token)" in answer.error["message"]
    assert "HTTP status 401" in installed.ctl("logs", "org/model", "--lines", "50").stdout


def test_a_fetch_reaches_no_address_of_the_link(installed: Installation, hub: FakeHub) -> None:
    """A hub that sends to where clouds keep the secrets of an instance."""
    installed.run("ip", "address", "replace", "169.254.169.254/32", "dev", "lo")
    with fake_hub("org/model", FILES), socket.create_server(("169.254.169.254", 80)) as metadata:
        metadata.setblocking(False)
        hub.endpoint = "http://169.254.169.254"
        configure(installed, hub)
        answer = chat("org/model")
        assert answer.status == 503
        assert "169.254.169.254" in answer.error["message"]
        with pytest.raises(BlockingIOError):
            metadata.accept()
