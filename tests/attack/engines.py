"""Two engines, as programs of the engine `command`: one that has something to lose, one that wants it. Both serve /health.

    engines.py victim SOCKET
    engines.py hostile SOCKET TARGETS      TARGETS: a JSON file that names the victim's processes

The hostile one notes in its runtime directory what came of each attempt: the error's name, or what it got.
"""

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

SHM_KEY = 0x6D6D64
LIBC = ctypes.CDLL(None, use_errno=True)


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


def attempt(what: Callable[[], Any]) -> str:
    try:
        return f"done: {what()!r}"
    except OSError as error:
        return type(error).__name__ if type(error) is not OSError else os.strerror(error.errno or 0)


def system_v() -> int:
    """shmget(2) of the victim's segment."""
    found: int = LIBC.shmget(SHM_KEY, 0, 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "shmget")
    return found


def connect(path: str) -> str:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as client:
            try:
                client.connect(path)
            except OSError as error:
                if "wrong type" not in str(error):
                    raise
            else:
                break
    return path


def dial(host: str, port: int) -> str:
    with socket.create_connection((host, port), timeout=0.5):
        return host


def write(path: str) -> str:
    Path(path).write_text("import os")
    return path


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def attack(target: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pid in target["pids"]:
        found[f"kill {pid}"] = attempt(partial(os.kill, pid, signal.SIGKILL))
        for name in ("mem", "environ", "root/dev/shm/secret", "cwd", "fd"):
            found[f"/proc/{pid}/{name}"] = attempt(partial(os.open, f"/proc/{pid}/{name}", os.O_RDONLY))
    found["System V shared memory"] = attempt(system_v)
    for path in target["read"]:
        found[f"read {path}"] = attempt(partial(os.open, path, os.O_RDONLY))
    for path in target["connect"]:
        found[f"connect {path}"] = attempt(partial(connect, path))
    for path in target["write"]:
        found[f"write {path}"] = attempt(partial(write, path))
    for host, port in target["dial"]:
        found[f"dial {host}"] = attempt(partial(dial, host, port))
    return found


def main() -> None:
    role, path = sys.argv[1:3]
    if role == "victim":
        Path("/dev/shm/secret").write_text("secret")
        Path("/dev/shm/secret").chmod(0o666)
        Path(os.environ["HOME"], "secret").write_text("secret")
        LIBC.shmget(SHM_KEY, 4096, 0o1666)  # IPC_CREAT, for everybody
    else:
        result = {
            "refused": attack(json.loads(Path(sys.argv[3]).read_text())),
            "shm": names("/dev/shm"),
            "processes": [pid for pid in names("/proc") if pid.isdigit()],
            "run": sorted(str(each) for each in Path("/run").rglob("*")),
            "own": attempt(lambda: write(os.environ["HOME"] + "/own")),
            "shm_own": attempt(lambda: write("/dev/shm/own")),
            "cwd": str(Path.cwd()),
        }
        Path(path).with_name("result.json").write_text(json.dumps(result))
    os.umask(0o007)
    UnixStreamServer(path, Health).serve_forever()


main()
