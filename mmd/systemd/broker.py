"""mmd-unit-broker@.service: drives model units for the gateway, which may not. One process for each connection.

It is root without capabilities, which systemd obeys over D-Bus, and trusts nothing: the kernel says who has connected, requests
are parsed strictly (`mmd.systemd.request`), and only units of templates that mmd-generator made are acted upon. The reasons for
a broker instead of a polkit rule: docs/decisions/unit-broker.md.
"""

import socket
import sys
from pathlib import Path
from typing import Final

from mmd.systemd.peer import Peer, serve_gateway
from mmd.systemd.worker import serve

__all__ = ["main"]

_TEMPLATES: Final = Path("/run/systemd/generator")
"""Where PID 1 has generators write what is as important as the administrator's files (systemd.generator(7), normal-dir)."""


def main() -> int:
    """Serves one connection of the gateway; the exit status."""
    return serve_gateway(_serve)


def _serve(connection: socket.socket, _: Peer) -> int:
    return serve(connection, user=False, templates=_TEMPLATES)


if __name__ == "__main__":
    sys.exit(main())
