"""What the relay asks of whoever decides about requests: the dispatcher in its own process, or one in another."""

from types import TracebackType
from typing import Protocol

from mmd.config import Config, Model
from mmd.gateway.relay.engine import EngineConnections
from mmd.names import UnitName

__all__ = ["Gate", "Place"]


class Place(Protocol):
    """One request's place: waiting, admitted to an instance, or over. Close it, or use it in a `with`."""

    @property
    def unit(self) -> UnitName | None:
        """The instance that it was admitted to at once; None: wait for `admitted`."""

    @property
    def waiting(self) -> bool: ...

    async def admitted(self, timeout_s: float | None = None) -> UnitName | None:
        """The instance to forward to, None when `timeout_s` passed first; ApiError when the request is turned away."""

    def unreachable(self) -> None:
        """Nobody listened at the instance: wait for another admission."""

    def close(self) -> None:
        """Give it back, in whatever state it is: a client that goes away while it waits costs nothing."""

    def __enter__(self) -> "Place": ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Gate(Protocol):
    """Lets requests through to engines."""

    @property
    def config(self) -> Config: ...

    def request(self, model: Model) -> Place:
        """Ask for an instance of `model`."""

    def endpoint(self, unit: UnitName) -> str | None:
        """Where the engine of an instance listens, if it has said so."""

    def connections(self, endpoint: str) -> EngineConnections: ...

    async def stage(self, model: Model) -> str:
        """What `model` is doing, for somebody who waits for it."""
