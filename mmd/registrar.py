"""mmd-registrar@.service: writes and removes files of models.d for the gateway, which may not. One request, and it is gone.

It is root, and believes nothing: the request is checked as `mmdctl add` checks it, and the files have names of its own making.
Who may connect says the mode of the socket, and whose request it is says the kernel (SO_PEERCRED, unix(7)).
"""

import select
import socket
import sys
import time

from mmd.registration import REQUEST_BYTES, carry_out
from mmd.scope import Scope
from mmd.systemd.peer import peer_of

__all__ = ["main"]

# The gateway has its request ready when it connects, and reads the answer at once.
_LIMIT_S = 10.0


def main() -> int:
    """Answers one request on standard input, a connection that systemd has accepted (Accept=yes, systemd.socket(5))."""
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        peer = peer_of(connection)
        if not peer.is_gateway:
            print(f"refused: {peer} is not the gateway", file=sys.stderr)
            return 1
        request = _read_line(connection)
        reply = b"" if request is None else carry_out(Scope.system(), request)
        told = reply.decode() if request is not None else f"no request within {_LIMIT_S:g} s, or one that is too long"
        print(f"asked by {peer}: {told}", file=sys.stderr)
        connection.settimeout(_LIMIT_S)
        try:
            connection.sendall(reply + b"\n" if reply else b"")
        except OSError as error:
            print(f"the answer was not taken: {error}", file=sys.stderr)
    return 0 if reply else 1


def _read_line(connection: socket.socket) -> bytes | None:
    """The request without its end; None when it does not come in time, or is too long."""
    line, deadline_s = b"", time.monotonic() + _LIMIT_S
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([connection], [], [], max(0.0, deadline_s - time.monotonic()))
        try:
            piece = connection.recv(65536) if ready else b""
        except OSError:
            piece = b""
        if not piece or len(line) > REQUEST_BYTES:
            return None
        line += piece
    return line


if __name__ == "__main__":
    sys.exit(main())
