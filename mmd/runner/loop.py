"""What the runner waits for: signals, the engine's output, the check in progress, the next thing due."""

import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable

from mmd.runner.check import Check

__all__ = ["Loop"]


class Loop:
    """A selector. Signals arrive as bytes on a socket (signal.set_wakeup_fd), so that they end the wait."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._selector = selectors.DefaultSelector()
        self._signals, self._wake_up = socket.socketpair()
        for end in (self._signals, self._wake_up):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_up.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: None)  # a handler of any kind, or the wake-up socket says nothing
        self._selector.register(self._signals, selectors.EVENT_READ)

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `descriptor` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, callback)

    def unwatch(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def wait(self, until_s: float, check: Check | None) -> bytes:
        """Return when something has happened or `until_s` (monotonic) has come; the signals received, one byte each."""
        descriptor = None if check is None or check.outcome is not None else check.descriptor
        if check is not None and descriptor is not None:
            self._selector.register(descriptor, check.events, check.advance)
        try:
            ready = self._selector.select(max(0.0, until_s - time.monotonic()))
        finally:
            if descriptor is not None:
                self._selector.unregister(descriptor)
        for key, _ in ready:
            if key.data is not None:
                key.data()
        try:
            return self._signals.recv(256)
        except BlockingIOError:
            return b""
