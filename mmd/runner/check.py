"""One question to the engine, without blocking: an HTTP request of which only the status is read, or a command.

The supervisor's loop calls `advance` when the check's descriptor is ready, `finished` when a child has ended, `expire` at the
deadline; `outcome` is None until it is known.
"""

import errno
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmd.engines.base import HttpCall
from mmd.errors import MmdError
from mmd.runner.process import describe_exit, signal_group, spawn

__all__ = ["Check", "CommandCheck", "HttpCheck", "Outcome"]

_STATUS_LINE_BYTES = len("HTTP/1.1 200")


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer, or why there is none."""

    healthy: bool
    text: str
    """For people: `answers 503`, `refuses connections`, `does not answer`."""
    status: int | None = None
    """HTTP status."""
    timed_out: bool = False


class HttpCheck:
    """One request on a fresh connection (a kept one could outlive the server's idle time-out and fail for that)."""

    def __init__(self, address: Path | int, call: HttpCall) -> None:
        """`address` is a Unix socket or a port of 127.0.0.1."""
        self.deadline_s = time.monotonic() + call.timeout_s
        self.outcome: Outcome | None = None
        self.events = selectors.EVENT_WRITE
        self._request = _encode(call)
        self._answer = b""
        unix = isinstance(address, Path)
        self._socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self._socket.setblocking(False)
        code = self._socket.connect_ex(str(address) if unix else ("127.0.0.1", address))
        if code not in (0, errno.EINPROGRESS):
            self._fail(code)

    @property
    def descriptor(self) -> int:
        return self._socket.fileno()

    def advance(self) -> None:
        try:
            if self.events == selectors.EVENT_WRITE:
                code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    self._fail(code)
                    return
                self._request = self._request[self._socket.send(self._request) :]
                if not self._request:
                    self.events = selectors.EVENT_READ
                return
            received = self._socket.recv(256)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.errno or errno.EIO)
            return
        self._answer += received
        if len(self._answer) >= _STATUS_LINE_BYTES or not received:
            self.outcome = _read(self._answer)

    def finished(self, pid: int, status: int) -> None:
        """Not about a child."""

    def expire(self) -> None:
        self.outcome = Outcome(healthy=False, text="does not answer", timed_out=True)

    def close(self) -> None:
        self._socket.close()

    def _fail(self, code: int) -> None:
        """EAGAIN is a full backlog (unix(7)): too busy to answer, which is not the same as gone."""
        refused = code in (errno.ECONNREFUSED, errno.ENOENT)
        text = "refuses connections" if refused else os.strerror(code)
        self.outcome = Outcome(healthy=False, text=text, timed_out=code == errno.EAGAIN)


class CommandCheck:
    """A program whose exit status 0 means healthy. Its output goes nowhere."""

    events = selectors.EVENT_READ
    descriptor: int | None = None

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], *, timeout_s: float) -> None:
        self.deadline_s = time.monotonic() + timeout_s
        self.outcome: Outcome | None = None
        self._pid: int | None = None
        try:
            self._pid = spawn(argv, environment, output=None)
        except MmdError as error:
            self.outcome = Outcome(healthy=False, text=str(error))

    def advance(self) -> None:
        """Has no descriptor to wait for."""

    def finished(self, pid: int, status: int) -> None:
        if pid == self._pid:
            self._pid = None
            self.outcome = Outcome(healthy=status == 0, text=f"health command {describe_exit(status)}")

    def expire(self) -> None:
        self.outcome = Outcome(healthy=False, text="health command does not end", timed_out=True)

    def close(self) -> None:
        if self._pid is not None:
            signal_group(self._pid, signal.SIGKILL)


Check = HttpCheck | CommandCheck


def _encode(call: HttpCall) -> bytes:
    body = b"" if call.body is None else json.dumps(call.body).encode()
    head = f"{call.method} {call.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    kind = "Content-Type: application/json\r\n" if body else ""
    return f"{head}{kind}\r\n".encode() + body


def _read(answer: bytes) -> Outcome:
    version, _, status = answer[:_STATUS_LINE_BYTES].partition(b" ")
    if not version.startswith(b"HTTP/1.") or not status.isdigit():
        return Outcome(healthy=False, text="does not speak HTTP" if answer else "closed the connection")
    code = int(status)
    return Outcome(healthy=200 <= code < 400, text=f"answers {code}", status=code)
