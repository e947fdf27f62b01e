"""What the relay is measured against: the upstream itself, nginx, and other people's proxies, all in front of one nginx."""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

__all__ = ["BODY", "DIRECT_PORT", "streaming_nginx", "upstream_conf", "yardsticks"]

DIRECT_PORT = 18080
_NGINX_PORT = 18081
_PROXY_PORT = 18082
_LMP_PORT = 18083
_STARTS_WITHIN_S = 20.0
_UNLIMITED = 1_000_000

BODY = '{"model":"fixed","messages":[{"role":"user","content":"hello"}],"max_tokens":16}'
_ANSWER = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"fixed","choices":[{"index":0,"message":'
    '{"role":"assistant","content":"Hello!"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":2,'
    '"total_tokens":11}}'
)


def _common(folder: str) -> str:
    temporary = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    return f"access_log off; keepalive_requests {_UNLIMITED}; {temporary}"


def upstream_conf(folder: str, socket: str) -> str:
    """nginx as the engine: a small fixed answer, on a Unix socket and (for the direct measurement) on a port."""
    return f"""worker_processes 1; daemon off; pid {folder}/upstream.pid; error_log stderr warn;
events {{ worker_connections 4096; }}
http {{ {_common(folder)}
  server {{ listen unix:{socket}; listen 127.0.0.1:{DIRECT_PORT};
    location / {{ default_type application/json; return 200 '{_ANSWER}'; }} }} }}
"""


def _proxy_conf(folder: str, socket: str, more: str = "") -> str:
    # Workers of root's: the socket is for the group mmd-model only.
    return f"""user root; worker_processes 1; daemon off; pid {folder}/proxy.pid; error_log stderr warn;
worker_rlimit_nofile 65536;
events {{ worker_connections 4096; }}
http {{ {_common(folder)} {more}
  upstream engine {{ server unix:{socket}; keepalive 256; keepalive_requests {_UNLIMITED}; }}
  server {{ listen 127.0.0.1:{_NGINX_PORT};
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; }} }} }}
"""


def _llama_swap(folder: Path, binary: Path) -> list[str]:
    model = {"cmd": "sleep 100000", "proxy": f"http://127.0.0.1:{DIRECT_PORT}", "concurrencyLimit": _UNLIMITED}
    (folder / "swap.yaml").write_text(json.dumps({"models": {"fixed": model}, "logLevel": "error"}))
    return [str(binary.resolve()), "--config", str(folder / "swap.yaml"), "--listen", f"127.0.0.1:{_PROXY_PORT}"]


def _large_model_proxy(folder: Path, binary: Path) -> list[str]:
    service = {
        "Name": "fixed",
        "ListenPort": str(_LMP_PORT),
        "ProxyTargetHost": "127.0.0.1",
        "ProxyTargetPort": str(DIRECT_PORT),
        "Command": "sleep",
        "Args": "100000",
        "ResourceRequirements": {},
    }
    (folder / "lmp.json").write_text(
        json.dumps({"ShutDownAfterInactivitySeconds": 100000, "ResourcesAvailable": {}, "Services": [service]})
    )
    return [str(binary.resolve()), "-c", str(folder / "lmp.json")]


@contextmanager
def yardsticks(socket: Path, llama_swap: Path | None, large_model_proxy: Path | None) -> Iterator[dict[str, tuple[int, int]]]:
    """By name, port and process id (0: unknown) of each, as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mmd-relay-") as name:
        folder = Path(name)
        (folder / "proxy.conf").write_text(_proxy_conf(name, str(socket)))
        commands: dict[str, tuple[int, list[str]]] = {
            "nginx": (_NGINX_PORT, ["nginx", "-c", str(folder / "proxy.conf")]),
        }
        if llama_swap is not None:
            commands["llama-swap"] = (_PROXY_PORT, _llama_swap(folder, llama_swap))
        if large_model_proxy is not None:
            commands["large-model-proxy"] = (_LMP_PORT, _large_model_proxy(folder, large_model_proxy))
        running: list[subprocess.Popen[bytes]] = []
        found = {"direct": (DIRECT_PORT, 0)}
        try:
            for title, (port, command) in commands.items():
                running.append(_start(command, folder))
                found[title] = (port, running[-1].pid)
                _wait(port)
            yield found
        finally:
            for process in running:
                process.terminate()
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
                process.wait()


@contextmanager
def streaming_nginx(socket: Path) -> Iterator[tuple[int, int]]:
    """nginx that passes on each event as it comes: port and process id."""
    with tempfile.TemporaryDirectory(prefix="mmd-relay-") as name:
        folder = Path(name)
        (folder / "proxy.conf").write_text(_proxy_conf(name, str(socket), "proxy_buffering off;"))
        process = _start(["nginx", "-c", str(folder / "proxy.conf")], folder)
        try:
            _wait(_NGINX_PORT)
            yield _NGINX_PORT, process.pid
        finally:
            process.terminate()
            process.wait()


def _start(command: Sequence[str], folder: Path) -> "subprocess.Popen[bytes]":
    log = (folder / f"{Path(command[0]).name}.log").open("wb")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def _wait(port: int) -> None:
    """Until a chat request is answered by 200: the proxies start their `engine` for it."""
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=_STARTS_WITHIN_S)
        try:
            connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise AssertionError(f"port {port}: no answer within {_STARTS_WITHIN_S:g} s")
        time.sleep(0.1)
