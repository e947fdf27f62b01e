"""mmd-sim: load, listen, serve until told to stop."""

import asyncio
import signal
import sys
from collections.abc import Sequence

from aiohttp import web

from mmd.sim.api import make_app
from mmd.sim.engine import Engine
from mmd.sim.options import Options, parse

__all__ = ["main"]

_SHUTDOWN_S = 5.0
"""How long requests in flight get at SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of mmd-sim: 0 after SIGTERM or SIGINT."""
    options = parse(sys.argv[1:] if argv is None else argv)
    asyncio.run(_serve(options))
    return 0


async def _serve(options: Options) -> None:
    engine = Engine(options)
    stop = asyncio.Event()
    await engine.load()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _ignore if options.faults.ignore_sigterm else stop.set)
    # A client that goes away cancels its request, as in vLLM: generation stops and the slot is free.
    runner = web.AppRunner(make_app(engine), handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        await _site(runner, options).start()
        if not options.faults.silent_load:
            print("INFO:     Application startup complete.", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _site(runner: web.AppRunner, options: Options) -> web.BaseSite:
    if options.socket is not None:
        return web.UnixSite(runner, str(options.socket))
    return web.TCPSite(runner, "127.0.0.1", options.port)


def _ignore() -> None:
    print("INFO SIGTERM ignored, as told", flush=True)


if __name__ == "__main__":
    sys.exit(main())
