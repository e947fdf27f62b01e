"""mmd-gateway(8): the program."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from mmd.errors import MmdError
from mmd.gateway.daemon import Daemon
from mmd.scope import Scope
from mmd.systemd.activation import ListenSocket, listen_sockets
from mmd.systemd.notify import Notifier, watchdog_interval_s

__all__ = ["main"]

_log = logging.getLogger("mmd.gateway")

# sd-daemon(3): a line that begins with <N> gets that priority in the journal.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


async def _run(scope: Scope, runtime_dir: Path, sockets: tuple[ListenSocket, ...], notifier: Notifier) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    reloads: set[asyncio.Task[None]] = set()
    daemon = Daemon(scope, runtime_dir, sockets)
    await daemon.start()

    async def reload() -> None:
        notifier.reloading()
        try:
            await daemon.reload()
        except MmdError as error:
            _log.error("reload failed: %s", error)
        finally:
            notifier.ready()

    def on_hangup() -> None:
        task = loop.create_task(reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    notifier.ready()
    notifier.status(f"{len(daemon.dispatcher.config.models)} models")
    _log.info("ready: %d models", len(daemon.dispatcher.config.models))
    watchdog = loop.create_task(_watchdog(notifier))
    await stopped.wait()
    notifier.stopping()
    notifier.status("finishing requests")
    await daemon.stop()
    watchdog.cancel()


async def _watchdog(notifier: Notifier) -> None:
    """Tell systemd that the event loop turns, draining included."""
    interval_s = watchdog_interval_s(os.environ)
    while interval_s:
        notifier.watchdog()
        await asyncio.sleep(interval_s / 3)


def main() -> None:
    """Serve on the sockets that systemd passes (sd_listen_fds(3)) until SIGTERM."""
    parser = argparse.ArgumentParser(prog="mmd-gateway", description="mmd's OpenAI-compatible gateway; started by its sockets.")
    parser.add_argument("--user", action="store_true", help="serve the caller's own instance (systemctl --user)")
    arguments = parser.parse_args()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    scope = Scope.user() if arguments.user else Scope.system()
    sockets = listen_sockets(os.environ)
    if not sockets:
        manager = "systemctl --user" if arguments.user else "systemctl"
        sys.exit(f"mmd-gateway: no listening sockets were passed: start it by {manager} start mmd-gateway.socket")
    runtime_dir = Path(os.environ.get("RUNTIME_DIRECTORY", scope.runtime_dir))
    try:
        uvloop.run(_run(scope, runtime_dir, sockets, Notifier()))
    except MmdError as error:
        sys.exit(f"mmd-gateway: {error}")


if __name__ == "__main__":
    main()
