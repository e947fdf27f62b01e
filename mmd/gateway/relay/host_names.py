"""Names in a request's Host that lead to this machine whoever answers for them in DNS.

A page can have any name of its own resolve to this machine (DNS rebinding), and its browser then takes the gateway for a part
of the page's origin. The name stays in Host, so one that only its owner's name server knows is refused
(mmd.gateway.relay.pages).
"""

import socket
from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path
from typing import Final

__all__ = ["host_of", "is_address", "own_names"]

_LOOPBACK: Final = frozenset(("localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback"))
# What containers call the machine that they run on: Open WebUI in Docker is the commonest client.
_CONTAINER: Final = frozenset(("host.docker.internal", "host.containers.internal"))
_HOSTS: Final = Path("/etc/hosts")
# RFC 1035, 2.3.4: names have 253 characters at most; with brackets and port this is more than enough.
_HOST_MAX_BYTES: Final = 300


def host_of(authority: bytes) -> str:
    """The name or address in `NAME:PORT` or `[ADDRESS]:PORT`, in lower case, without a final dot; "" when it is neither."""
    if len(authority) > _HOST_MAX_BYTES or not authority.isascii():
        return ""
    text = authority.decode("ascii").lower()
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        if not closed or ":" not in name or (port and not port.startswith(":")):
            return ""
        port = port.removeprefix(":")
    else:
        name, _, port = text.partition(":")
    if port and not port.isdecimal():
        return ""
    return name.removesuffix(".")


@lru_cache(maxsize=256)
def is_address(authority: bytes) -> bool:
    """Whether it is an IP address or a name of loopback, which need no look at the settings."""
    name = host_of(authority)
    if name in _LOOPBACK or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def own_names() -> Collection[str]:
    """What this machine is called, in containers as well. The host name may change while the gateway runs."""
    return _names(socket.gethostname().lower())


@lru_cache(maxsize=1)
def _names(name: str) -> frozenset[str]:
    """Of a machine with this host name: as it is, short, for mDNS (RFC 6762), and in full as /etc/hosts has it (hostname(1)).

    Name servers are not asked: that may take seconds, and they may be somebody else's.
    """
    short = name.partition(".")[0]
    found = {name, short, f"{short}.local"} | _CONTAINER
    try:
        lines = _HOSTS.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.partition("#")[0].lower().split()[1:]
        if name in words or short in words:
            found.update(word for word in words if word.partition(".")[0] == short)
    return frozenset(found - {""})
