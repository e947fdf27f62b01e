"""What mmd-port@.service runs: hands the listening socket of a model's own port to the gateway, or has the gateway close it.

    python -m mmd.systemd.handport open|close ID GATEWAY-SOCKET

A gateway that runs gets no new sockets from systemd, hence this. It says what mmd.gateway.ports hears, with the socket as
SCM_RIGHTS (unix(7)), and does so with little of the standard library: a client waits meanwhile.
"""

import os
import socket
import sys
import time

__all__ = ["main"]

_FD = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)

# Longer than an upgrade of the gateway takes, during which nobody answers; less than the unit's TimeoutStopSec=.
_ANSWER_WITHIN_S = 9.0

# systemd tries again for as long as a client waits, and should not do so all the time.
_PAUSE_S = 1.0


def main() -> int:
    """0: the gateway has done it. One that is gone has closed its ports."""
    verb, unit_id, path = sys.argv[1:]
    if verb == "open" and os.environ.get("LISTEN_PID") != str(os.getpid()):
        return _fail(f"no socket was passed: start it by systemctl start mmd-port-{unit_id}.socket")
    message = f'{{"type":"{verb}","id":"{unit_id}"}}'.encode()
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            if _say(path, message, [_FD] if verb == "open" else [], left_s):
                return 0
    except OSError as error:
        if verb == "close" and not isinstance(error, TimeoutError):
            return 0
        reason = error.strerror or str(error)
    else:
        reason = "it does not answer"
    time.sleep(_PAUSE_S)
    return _fail(f"the gateway cannot be told at {path}: {reason}: journalctl -u mmd-gateway")


def _say(path: str, message: bytes, fds: list[int], timeout_s: float) -> bool:
    """Whether there was an answer; if not, another gateway takes over, and is to be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gateway:
        gateway.settimeout(timeout_s)
        gateway.connect(path)
        try:
            socket.send_fds(gateway, [message], fds)
            return bool(gateway.recv(1024))
        except (BrokenPipeError, ConnectionResetError):
            return False


def _fail(reason: str) -> int:
    print(f"mmd-port: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
