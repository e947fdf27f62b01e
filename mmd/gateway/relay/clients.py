"""How many connections each client has."""

from collections import Counter
from ipaddress import IPv6Address

__all__ = ["Clients", "client_of"]


class Clients:
    """Counts connections over TCP by client, those that came while there was a limit."""

    def __init__(self) -> None:
        self._clients: dict[object, str] = {}
        self._counts: Counter[str] = Counter()

    def come(self, connection: object, peer: object, limit: int, *, fresh: bool) -> bool:
        """Count a connection; False when its client has `limit` others. A `fresh` one is not counted then."""
        client = client_of(peer)
        if not client:
            return True
        within = self._counts[client] < limit
        if within or not fresh:
            self._clients[connection] = client
            self._counts[client] += 1
        return within

    def go(self, connection: object) -> None:
        """It is no more."""
        client = self._clients.pop(connection, None)
        if client is not None:
            self._counts[client] -= 1
            if not self._counts[client]:
                del self._counts[client]


def client_of(peer: object) -> str:
    """Who is at a socket's address: an IPv4 address, or the IPv6 network of 64 bits, which is the least that a customer gets
    (RFC 6177), with more addresses than could be counted. "" for a Unix socket's."""
    host = peer[0] if isinstance(peer, tuple) and peer and isinstance(peer[0], str) else ""
    if ":" not in host:
        return host
    address = IPv6Address(host.partition("%")[0])
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else f"{int(address) >> 64:016x}"
