"""mmd-gateway(8): the program."""

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from mmd.errors import MmdError
from mmd.gateway.log import log_to_journal
from mmd.gateway.relay import compiled
from mmd.scope import Scope, ScopeKind
from mmd.systemd.activation import ListenSocket, listen_sockets
from mmd.systemd.client import Systemd
from mmd.systemd.notify import Notifier, watchdog_interval_s
from mmd.systemd.unit import Event

if TYPE_CHECKING:
    from mmd.gateway.daemon import Daemon
    from mmd.gateway.handover import Predecessor

__all__ = ["main"]

_log = logging.getLogger("mmd.gateway")

_PATIENCE_S = 30.0


async def _run(scope: Scope, take_over: int | None, notifier: Notifier) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()
    turn = asyncio.Lock()
    predecessor = None if take_over is None else _predecessor(take_over)
    sockets = listen_sockets(os.environ) if predecessor is None else await predecessor.sockets
    daemon = await _start(scope, sockets, predecessor)
    watchdog = loop.create_task(_watchdog(notifier))

    async def reload() -> None:
        notifier.reloading()
        try:
            await daemon.reload()
        except MmdError as error:
            _log.error("reload failed: %s", error)
        finally:
            notifier.ready()

    async def upgrade() -> None:
        def announce(pid: int) -> None:
            notifier.main_process(pid)
            watchdog.cancel()

        notifier.reloading()
        if await daemon.hand_over(_command(scope), announce):
            over.set()
        else:
            notifier.ready()

    async def in_turn(work: Callable[[], Coroutine[None, None, None]]) -> None:
        async with turn:
            if not over.is_set():
                await work()

    def start(work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = loop.create_task(in_turn(work))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    loop.add_signal_handler(signal.SIGHUP, start, reload)
    loop.add_signal_handler(signal.SIGUSR2, start, upgrade)
    notifier.ready()
    notifier.status(f"{len(daemon.dispatcher.config.models)} models")
    _log.info("ready: %d models, relay %s", len(daemon.dispatcher.config.models), "compiled" if compiled() else "interpreted")
    await over.wait()
    notifier.stopping()
    notifier.status("finishing requests")
    patience = loop.create_task(_keep_patient(notifier))
    await daemon.stop()
    watchdog.cancel()
    patience.cancel()


def _predecessor(end: int) -> "Predecessor":
    from mmd.gateway.handover import Predecessor  # not imported for nothing: clients wait while a gateway starts

    return Predecessor(socket.socket(fileno=end))


def _command(scope: Scope) -> tuple[str, ...]:
    """How this program is started, without what it was told the last time."""
    return (sys.argv[0], *(("--user",) if scope.kind is ScopeKind.USER else ()))


async def _start(scope: Scope, sockets: tuple[ListenSocket, ...], predecessor: "Predecessor | None") -> "Daemon":
    """A gateway that serves. Clients wait for it: the D-Bus worker comes up while the gateway's modules, aiohttp above all, are
    imported, which takes longest of all."""
    gc.disable()
    watchers: list[Callable[[Event], None]] = []

    def on_event(event: Event) -> None:
        for watcher in watchers:
            watcher(event)

    systemd, module = await asyncio.gather(
        Systemd.connect(broker=scope.unit_broker_socket, on_event=on_event),
        asyncio.to_thread(import_module, "mmd.gateway.daemon"),
    )
    # What the unit's RuntimeDirectory= and StateDirectory= made (systemd.exec(5)).
    runtime_dir = Path(os.environ.get("RUNTIME_DIRECTORY", str(scope.runtime_dir)).split(":")[0])
    state_dir = Path(os.environ.get("STATE_DIRECTORY", scope.state_dir))
    daemon: Daemon = module.Daemon(scope, systemd, runtime_dir=runtime_dir, state_dir=state_dir, sockets=sockets)
    watchers.append(daemon.on_systemd)
    await daemon.start(predecessor)
    gc.freeze()  # modules stay: no collection need look at them again
    gc.enable()
    return daemon


async def _keep_patient(notifier: Notifier) -> None:
    """While requests are finished, move TimeoutStopSec= on (sd_notify(3)): gateway.drain_timeout may be longer."""
    while True:
        notifier.extend(_PATIENCE_S)
        await asyncio.sleep(_PATIENCE_S / 3)


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
    parser.add_argument("--take-over", type=int, metavar="FD", help=argparse.SUPPRESS)  # a gateway's, for its successor
    arguments = parser.parse_args()
    log_to_journal()
    scope = Scope.user() if arguments.user else Scope.system()
    if arguments.take_over is None and os.environ.get("LISTEN_PID") != str(os.getpid()):
        manager = "systemctl --user" if arguments.user else "systemctl"
        sys.exit(f"mmd-gateway: no listening sockets were passed: start it by {manager} start mmd-gateway.socket")
    # OpenSSL would read all certificates in one file while aiohttp is imported, 80 ms. In the directory beside it, it looks up
    # the one it needs when a connection needs one.
    os.environ.setdefault("SSL_CERT_FILE", os.devnull)
    try:
        uvloop.run(_run(scope, arguments.take_over, Notifier()))
    except MmdError as error:
        sys.exit(f"mmd-gateway: {error}")


if __name__ == "__main__":
    main()
