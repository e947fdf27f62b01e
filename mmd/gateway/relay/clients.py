"""Who the clients are, by their addresses, and how many connections each has."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

__all__ = ["Clients", "Whose", "client_of", "forwarded_for", "is_local", "is_trusted"]

# An address in X-Forwarded-For: 192.0.2.7, 192.0.2.7:4711, 2001:db8::7, [2001:db8::7], [2001:db8::7]:4711.
_BRACKETED: Final = re.compile(rb"\[([0-9A-Fa-f:.]{2,45})(?:%[0-9A-Za-z._~-]{1,32})?\](?::[0-9]{1,5})?")
_IPV4: Final = re.compile(rb"([0-9.]{7,15})(?::[0-9]{1,5})?")
_IPV6: Final = re.compile(rb"([0-9A-Fa-f:.]{2,45})(?:%[0-9A-Za-z._~-]{1,32})?")

# How many proxies in a row are believed: what is left of them is a client's own to write.
_HOPS_MAX: Final = 16


class Whose:
    """Whose a client's connection is, as its server finds out."""

    __slots__ = ("client", "forwarded", "proxied")

    def __init__(self) -> None:
        self.client = ""
        """See `client_of`."""
        self.proxied = False
        """It is one of gateway.trusted_proxies, and says who its clients are."""
        self.forwarded = ""
        """The address that it says the request in hand is from; "": it does not say."""

    @property
    def name(self) -> str:
        """Whose the request in hand is, see `client_of`."""
        return client_of((self.forwarded,)) if self.forwarded else self.client


class Clients:
    """Counts connections over TCP by client, those that came while there was a limit."""

    def __init__(self) -> None:
        self._clients: dict[object, str] = {}
        self._counts: Counter[str] = Counter()

    def come(self, connection: object, client: str, limit: int, *, fresh: bool) -> bool:
        """Count a connection; False when its client (`client_of`) has `limit` others. A `fresh` one is not counted then.
        Clients on this machine are not counted at all."""
        if is_local(client):
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


def is_local(client: str) -> bool:
    """Whether a client (`client_of`) is on this machine."""
    return not client or client.startswith("127.") or client == "0" * 16  # ::1


def _address(peer: object) -> IPv4Address | IPv6Address | None:
    host = peer[0] if isinstance(peer, tuple) and peer and isinstance(peer[0], str) else ""
    return _parsed(host.partition("%")[0])


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return address if mapped is None else mapped


@lru_cache(maxsize=64)
def _network(text: str) -> IPv4Network | IPv6Network:
    return ip_network(text)


def _is_in(address: IPv4Address | IPv6Address, networks: Iterable[str]) -> bool:
    return any(address in _network(each) for each in networks)  # one of another version holds none


def is_trusted(peer: object, proxies: Sequence[str]) -> bool:
    """Whether a proxy of `proxies`, networks, is at a socket's address."""
    if not proxies:
        return False
    address = _address(peer)
    return address is not None and _is_in(address, proxies)


def forwarded_for(values: Iterable[bytes], proxies: Sequence[str]) -> str:
    """Whom a trusted proxy acts for, by its X-Forwarded-For fields: the rightmost address that is no such proxy itself, since
    each appends who has connected to it. "" where there is none, or what stands there is no address."""
    hops = b",".join(values).rsplit(b",", _HOPS_MAX)[-_HOPS_MAX:]
    for hop in reversed(hops):
        text = hop.strip(b" \t")
        found = _BRACKETED.fullmatch(text) or _IPV4.fullmatch(text) or _IPV6.fullmatch(text)
        address = _parsed(found[1].decode()) if found is not None else None
        if address is None:
            return ""
        if not _is_in(address, proxies):
            return str(address)
    return ""
