"""Who listens at a TCP port of loopback, by sock_diag(7): TCP has no SO_PEERCRED.

A port that an engine has let go of may be taken by any local user, who would get the engine's requests. The kernel is asked as
it would look a connection's listener up itself (`inet_lookup`), so whatever address the engine listens on (127.0.0.1, 0.0.0.0,
a dual-stack [::]) the answer is about the socket that gets the connection.
"""

import errno
import os
import socket
import struct
from typing import Final

__all__ = ["ForeignListenerError", "check_owner"]

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1
_ANY_STATE: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE, twice

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST: Final = struct.Struct("=BBBBI")  # struct inet_diag_req_v2, but for the id
_PORTS: Final = struct.Struct("!HH")  # struct inet_diag_sockid: ports and addresses are in network byte order
_REST: Final = struct.Struct("=III")
_ANSWER_TAIL: Final = struct.Struct("=IIIII")  # struct inet_diag_msg behind the id: expires, rqueue, wqueue, uid, inode
_ANSWER_TAIL_AT: Final = 16 + 4 + 48

_ANYWHERE: Final = ("0.0.0.0", 0)  # noqa: S104 - no address to listen on: no peer, in a question


class ForeignListenerError(OSError):
    """What listens there belongs to somebody else, or nothing does any more."""


def check_owner(local: tuple[str, int], peer: tuple[str, int], uid: int) -> None:
    """Whether `peer` of a TCP connection over loopback is a socket of user `uid`; ForeignListenerError when it is not.

    OSError when the kernel cannot be asked (no AF_NETLINK, no tcp_diag): then the connection must not be used either.

    First the listener, then the accepted socket: one that has not been accepted yet belongs to its listener, and dies with it.
    In the other order a listener could be replaced between the two questions.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.setblocking(False)  # the kernel answers while it is asked
        kernel.bind((0, 0))
        listener, _ = _ask(kernel, peer, _ANYWHERE)
        accepted, inode = _ask(kernel, peer, local)
    if listener != uid or (inode and accepted != uid):  # without an inode it is not accepted, and older kernels say uid 0
        other = listener if listener != uid else accepted
        raise ForeignListenerError(f"port {peer[1]} belongs to user {other}, not to the engine's ({uid})")


def _ask(kernel: socket.socket, here: tuple[str, int], there: tuple[str, int]) -> tuple[int, int]:
    """Uid and inode of the socket whose own address is `here`."""
    pad = bytes(12)
    identity = b"".join(
        (
            _PORTS.pack(here[1], there[1]),
            *(socket.inet_aton(address[0]) + pad for address in (here, there)),
            _REST.pack(0, _NO_COOKIE, _NO_COOKIE),
        )
    )
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, _ANY_STATE) + identity
    kernel.sendto(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request, (0, 0))
    answer = kernel.recv(8192)
    kind = _HEADER.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code == errno.ENOENT:
            raise ForeignListenerError(f"nothing listens at port {here[1]} any more")
        raise OSError(code, f"sock_diag: {os.strerror(code)}")
    if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _ANSWER_TAIL_AT + _ANSWER_TAIL.size:
        raise OSError(errno.EPROTO, "sock_diag answers something else")
    *_, uid, inode = _ANSWER_TAIL.unpack_from(answer, _ANSWER_TAIL_AT)
    return uid, inode
