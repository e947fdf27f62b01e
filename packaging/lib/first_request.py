"""Sends one chat request to the gateway, as any client would, and shows the answer; its address goes to the file argv[1].

Where clients need an API key, of which there is none here, it goes to the admin socket, which asks for none.

Standard library only: it runs before anybody has installed a client.
"""

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_START_LIMIT_S = 20.0
"""The gateway answers within a second of the first connection; on a busy machine, of a few."""
_LOAD_LIMIT_S = 660.0
"""A large model may load this long: gateway.wait_limit is 10 minutes, then the gateway itself answers."""
_ADMIN_SOCKET = "/run/mmd/admin.sock"
_QUESTION = "In one sentence: what are you?"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, whose path is the `host`."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.host)


def main() -> int:
    address = _listen_address()
    asked = _ADMIN_SOCKET if _asks_for_keys(address) else address
    models = [model["id"] for model in _call(asked, "GET", "/v1/models", None, _START_LIMIT_S)["data"]]
    if not models:
        raise SystemExit("  no models are configured: add one to /etc/mmd/mmd.yaml")
    name = _ready_model() or models[0]
    print(f"  model     {name}\n  question  {_QUESTION}", flush=True)
    began = time.monotonic()
    body = {"model": name, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64}
    answer = _call(asked, "POST", "/v1/chat/completions", body, _LOAD_LIMIT_S)
    print(f"  answer    {answer['choices'][0]['message']['content']}", flush=True)
    print(f"  time      {time.monotonic() - began:.1f} s, loading included", flush=True)
    Path(sys.argv[1]).write_text(address if address.startswith("/") else f"http://{address}")
    return 0


def _listen_address() -> str:
    """Where systemd listens for the gateway: the first TCP address, else the first Unix socket."""
    show = ["systemctl", "show", "--property=Listen", "--value", "mmd-gateway.socket"]
    lines = subprocess.run(show, check=True, capture_output=True, text=True).stdout.split("\n")
    listens = [line.split(" ")[0] for line in lines if line.endswith("(Stream)")]
    if not listens:
        raise SystemExit("  mmd-gateway.socket listens nowhere")
    return next((listen for listen in listens if not listen.startswith("/")), listens[0]).replace("0.0.0.0:", "127.0.0.1:")


def _ready_model() -> str | None:
    """A model that is loaded: asking another one could push it out."""
    status = subprocess.run(["/usr/bin/mmdctl", "status", "--json"], check=False, capture_output=True, text=True)
    if status.returncode != 0:
        return None
    return next((model["name"] for model in json.loads(status.stdout)["models"] if model["state"] == "ready"), None)


def _asks_for_keys(address: str) -> bool:
    return _exchange(address, "GET", "/v1/models", None, _START_LIMIT_S)[0] == http.client.UNAUTHORIZED


def _call(address: str, method: str, path: str, body: object, limit_s: float) -> Any:
    """One JSON request; ends the program with the gateway's own words when it is refused."""
    status, text = _exchange(address, method, path, body, limit_s)
    if status != http.client.OK:
        raise SystemExit(f"  {method} {path} on {address}: {status} {text}")
    return json.loads(text)


def _exchange(address: str, method: str, path: str, body: object, limit_s: float) -> tuple[int, str]:
    """Status and text of an answer; ends the program when there is none."""
    kind = _UnixConnection if address.startswith("/") else http.client.HTTPConnection
    connection = kind(address, timeout=limit_s)
    try:
        connection.request(method, path, json.dumps(body), {"Host": "localhost", "Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError as error:
        raise SystemExit(f"  {method} {path} on {address}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
