"""mmd-registrar@.service: writes and removes files of models.d for the gateway, which may not. One request, and it is gone.

It is root, and believes nothing: the request is checked as `mmdctl add` checks it, and the files have names of its own making.
Who may connect says the mode of the socket, and whose request it is says the kernel (SO_PEERCRED, unix(7)).
"""

import socket
import sys

from mmd.registration import REQUEST_BYTES, carry_out
from mmd.scope import Scope
from mmd.systemd.peer import Peer, read_line, serve_gateway

__all__ = ["main"]

# The gateway has its request ready when it connects, and reads the answer at once.
_LIMIT_S = 10.0


def main() -> int:
    """Answers one request of the gateway; the exit status."""
    return serve_gateway(_answer)


def _answer(connection: socket.socket, peer: Peer) -> int:
    request = read_line(connection, most_bytes=REQUEST_BYTES, limit_s=_LIMIT_S)
    reply = b"" if request is None else carry_out(Scope.system(), request)
    told = reply.decode() if request is not None else f"no request within {_LIMIT_S:g} s, or one that is too long"
    print(f"asked by {peer}: {told}", file=sys.stderr)
    connection.settimeout(_LIMIT_S)
    try:
        connection.sendall(reply + b"\n" if reply else b"")
    except OSError as error:
        print(f"the answer was not taken: {error}", file=sys.stderr)
    return 0 if reply else 1


if __name__ == "__main__":
    sys.exit(main())
