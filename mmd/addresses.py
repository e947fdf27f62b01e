"""Addresses that something listens on, as the configuration has them: `127.0.0.1:8000`, `[::1]:8000`, `/x.sock` (pure)."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mmd.check import Complaint
from mmd.config import Gateway, Model

__all__ = ["Address", "PortsTaken", "parse_address"]

_EVERY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - nothing is bound here
_NAMES = {"localhost": "127.0.0.1"}  # systemd resolves no names, systemd.socket(5)


class Address(NamedTuple):
    """A TCP address, or with `port` 0 the path of a Unix socket."""

    host: str
    port: int = 0

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it; so with a Unix socket."""
        return self.port == 0 or self.host == "::1" or self.host.startswith("127.")

    def clashes(self, other: "Address") -> bool:
        """Whether nobody can listen on both."""
        if self.port == 0 or other.port == 0:
            return self == other
        return self.port == other.port and (self.host == other.host or bool(_EVERY & {self.host, other.host}))


def parse_address(text: str) -> Address:
    """The address that `text`, of mmd.kinds.ADDRESS, stands for; an IPv6 address in its one short form."""
    if text.startswith("/"):
        return Address(text)
    host, _, port = text.rpartition(":")
    if not host.startswith("["):
        return Address(_NAMES.get(host, host), int(port))
    import ipaddress  # rarely needed, and slow to import for a generator

    try:
        return Address(str(ipaddress.IPv6Address(host[1:-1])), int(port))
    except ValueError:
        return Address(host, int(port))


class PortsTaken:
    """Addresses that are spoken for: a second claim is a complaint that names the first.

    Two engines may be told to listen on the same port, if they never run together; clients' ports are open all the time.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._ports: list[tuple[Address, str]] = []
        self._engines: list[tuple[Address, str]] = []
        for key, addresses in (("gateway.listen", gateway.listen), ("gateway.admin_listen", gateway.admin_listen)):
            self._ports += ((parse_address(address), f"{key}, {address}") for address in addresses)

    def check(self, model: Model) -> Iterator[Complaint]:
        engine = _engine_address(model)
        if model.port is not None:
            address = parse_address(model.port)
            if engine is not None and engine.clashes(address):
                yield (
                    ("port",),
                    f"{model.port} is where its engine listens",
                    "write listen: tcp, and a free port is chosen for it",
                )
            elif (holder := _holder([*self._ports, *self._engines], address)) is not None:
                yield ("port",), f"{model.port} is taken by {holder}", "choose another port"
        if engine is not None and (holder := _holder(self._ports, engine)) is not None:
            yield ("listen",), f"tcp:{engine.port} is taken by {holder}", "write tcp: a free port is chosen"

    def add(self, model: Model) -> None:
        engine = _engine_address(model)
        if model.port is not None:
            self._ports.append((parse_address(model.port), f"the port of {model.name}, {model.port}"))
        if engine is not None:
            self._engines.append((engine, f"the engine of {model.name}, listen: tcp:{engine.port}"))


def _engine_address(model: Model) -> Address | None:
    """Where the engine listens, if the configuration says it."""
    return None if model.listen_port is None else Address(_NAMES["localhost"], model.listen_port)


def _holder(taken: Iterable[tuple[Address, str]], address: Address) -> str | None:
    return next((holder for each, holder in taken if each.clashes(address)), None)
