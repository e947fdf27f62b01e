"""Times to the first byte, seen by a client on the machine."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["chat_request", "first_byte_ms", "first_healthy_s", "get_request", "waiting_client"]

_ADDRESS = ("127.0.0.1", 8000)
_TIMEOUT_S = 60.0
_POLL_S = 0.001


def get_request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def chat_request(model: str) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


def first_byte_ms(request: bytes) -> float:
    """From before connect(2) until the first byte of the answer, which must be a 200."""
    begun = time.perf_counter()
    return (_first_byte_s(request) - begun) * 1000


def _first_byte_s(request: bytes) -> float:
    """When the first byte came (time.perf_counter)."""
    with socket.create_connection(_ADDRESS, timeout=_TIMEOUT_S) as connection:
        connection.sendall(request)
        start = connection.recv(1)
        came = time.perf_counter()
        start += connection.recv(64)
        if not start.startswith(b"HTTP/1.1 200 "):
            raise AssertionError(f"not a 200: {start!r}")
        while connection.recv(65536):
            pass
    return came


@contextmanager
def waiting_client(request: bytes) -> Iterator[list[float]]:
    """A client that waits in a thread of its own; at the end of the context the list holds when its first byte came."""
    came: list[float] = []
    thread = threading.Thread(target=lambda: came.append(_first_byte_s(request)))
    thread.start()
    try:
        yield came
    finally:
        thread.join()


def first_healthy_s(engine_socket: Path) -> float:
    """Asks an engine for its health every millisecond, and returns when it was first answered by 200 (time.perf_counter)."""
    deadline = time.perf_counter() + _TIMEOUT_S
    while time.perf_counter() < deadline:
        if _is_healthy(engine_socket):
            return time.perf_counter()
        time.sleep(_POLL_S)
    raise AssertionError(f"{engine_socket}: not healthy within {_TIMEOUT_S:g} s")


def _is_healthy(engine_socket: Path) -> bool:
    connection = http.client.HTTPConnection("localhost", timeout=_TIMEOUT_S)
    with socket.socket(socket.AF_UNIX) as connection.sock:
        try:
            connection.sock.connect(str(engine_socket))
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:  # not listening yet
            return False
