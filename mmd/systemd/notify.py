"""Readiness, status and watchdog messages to systemd: sd_notify(3).

A thin wrapper of the package sdnotify, which is used with `debug=True` because it otherwise swallows every error: a STATUS with
a character outside latin-1 would be lost without a trace. It stays light (no asyncio, no logging) for the sake of mmd-runner.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from sdnotify import SystemdNotifier

__all__ = ["STATUS_LIMIT", "Notifier", "watchdog_interval_s"]

STATUS_LIMIT: Final = 200
"""Characters of a status: one line of `systemctl status`."""

# systemd may be busy for seconds with a daemon-reload while its queue of messages is full. A message that must arrive waits for
# it this long; one that is repeated anyway does not wait, since its sender has an event loop to turn.
_MUST_ARRIVE_TIMEOUT_S: Final = 10.0


class Notifier:
    """Messages to the service manager. Without NOTIFY_SOCKET in the environment (started by hand) it does nothing."""

    def __init__(self, *, report: Callable[[str], None] | None = None) -> None:
        """`report` is told the first error (then no other); by default it goes to standard error."""
        self._report = report or _to_stderr
        self._failed = False
        self._notifier: SystemdNotifier | None = None
        if os.environ.get("NOTIFY_SOCKET"):
            try:
                self._notifier = SystemdNotifier(debug=True)
            except OSError as error:
                self._fail(error)

    def ready(self) -> None:
        """Started, or done with a reload."""
        self._send("READY=1", timeout_s=_MUST_ARRIVE_TIMEOUT_S)

    def status(self, text: str) -> None:
        """What it is doing, for people: folded to one line of ASCII, cut to STATUS_LIMIT characters."""
        self._send(f"STATUS={_fold(text)}")

    def extend(self, seconds: float) -> None:
        """There is progress: allow the present start or stop that many seconds from now (EXTEND_TIMEOUT_USEC)."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        """Alive; to be repeated within `watchdog_interval_s`."""
        self._send("WATCHDOG=1")

    def reloading(self) -> None:
        """Reloading its configuration; `ready` ends that."""
        now_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_usec}", timeout_s=_MUST_ARRIVE_TIMEOUT_S)

    def main_process(self, pid: int) -> None:
        """Another process is the service's main one from now on (MAINPID); of this one nothing is heard any more."""
        self._send(f"MAINPID={pid}", timeout_s=_MUST_ARRIVE_TIMEOUT_S)
        self.close()

    def stopping(self) -> None:
        """About to exit."""
        self._send("STOPPING=1", timeout_s=_MUST_ARRIVE_TIMEOUT_S)

    def close(self) -> None:
        """Send no more."""
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _send(self, message: str, *, timeout_s: float = 0.0) -> None:
        if self._notifier is None:
            return
        try:
            self._notifier.socket.settimeout(timeout_s)
            self._notifier.notify(message)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            self._report(f"cannot notify systemd: {error.strerror or error}; further such errors are not reported")


def watchdog_interval_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """WatchdogSec=: systemd wants a `watchdog` within each such interval, so send several (sd_watchdog_enabled(3)).

    None when nobody watches this process.
    """
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or int(usec) == 0 or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6


def _fold(text: str) -> str:
    line = " ".join(text.split())
    return "".join(character if " " <= character <= "~" else "?" for character in line)[:STATUS_LIMIT]


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"<4>{message}\n")  # <4>: a warning in the journal, sd-daemon(3)
