"""mmd-runner: the main process of a model unit. It starts the engine, tells systemd how that goes, and watches over it.

It stays resident next to every model, so it is small: one thread, one selector loop, the standard library and sdnotify. No
asyncio (5 MiB) and no HTTP library: a health check needs an answer's status only. What it does, by module:

- `options`: the command line; `launch`: sockets, ports, macros, environment of the engine
- `process`: spawning, killing and reaping processes; `output`: the engine's log
- `check`: one health check or warm-up request, without blocking; `supervisor`: the loop that ties them together
"""

import os
import sys
from collections.abc import Sequence

from mmd.errors import MmdError
from mmd.printable import printable
from mmd.runner.options import parse
from mmd.runner.supervisor import Supervisor

__all__ = ["main"]

_EX_USAGE = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of mmd-runner.

    Exit status: 0 after SIGTERM or SIGINT, 69 when the engine never became ready, 1 when it failed afterwards, 64 when the
    arguments are wrong.
    """
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
    except MmdError as error:
        print(f"mmd-runner: {printable(str(error))}", file=sys.stderr)
        return _EX_USAGE
    return Supervisor(options, os.environ).run()
