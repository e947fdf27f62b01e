"""What the relay asks of whoever decides about requests: the dispatcher in its own process, or one in another."""

from mmd.config import Config, Model
from mmd.gateway.relay.engine import EngineConnections
from mmd.gateway.relay.kept import KeptAnswers
from mmd.names import UnitName

__all__ = ["Gate", "Place"]


class Place:
    """One request's place: waiting, admitted to an instance, or over. Close it, or use it in a `with`."""

    __slots__ = ("unit",)

    def __init__(self, unit: UnitName | None) -> None:
        self.unit = unit
        """The instance that it was admitted to at once; None: wait for `admitted`."""

    @property
    def waiting(self) -> bool:
        raise NotImplementedError

    async def admitted(self, timeout_s: float | None = None) -> UnitName | None:
        """The instance to forward to, None when `timeout_s` passed first; ApiError when the request is turned away."""
        raise NotImplementedError

    async def progress(self) -> str:
        """What it waits for, in a line."""
        raise NotImplementedError

    def unreachable(self, wait_s: float | None) -> None:
        """Nobody listened at the instance: wait for another admission, see `Gate.request`."""
        raise NotImplementedError

    def close(self) -> None:
        """Give it back, in whatever state it is: a client that goes away while it waits costs nothing."""
        raise NotImplementedError

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Gate:
    """Lets requests through to engines. No Protocol: calls through one are slow in compiled modules."""

    @property
    def config(self) -> Config:
        raise NotImplementedError

    def request(self, model: Model, wait_s: float | None) -> Place:
        """Ask for an instance of `model`, and wait for `wait_s` at most; None: as long as anybody may."""
        raise NotImplementedError

    def endpoint(self, unit: UnitName) -> str | None:
        """Where the engine of an instance listens, if it has said so."""
        raise NotImplementedError

    def connections(self, endpoint: str) -> EngineConnections:
        raise NotImplementedError

    def kept(self) -> KeptAnswers:
        """Whose the answers are that engines keep. A worker knows none, and tells of those that are added to them."""
        raise NotImplementedError
