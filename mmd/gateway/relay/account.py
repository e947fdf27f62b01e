"""How a request stands, for somebody who asks."""

from typing import NamedTuple

from mmd.config import Model

__all__ = ["Account"]


class Account(NamedTuple):
    """Not compiled, and made only when asked for."""

    id_prefix: bytes
    number: int
    model: Model
    state: str
    """As in mmd.status.RequestStatus."""
    begun: float
    """When it was read, by the loop's clock."""
    stream: bool
    sent_bytes: int
    tokens: int | None
    key: str
    """The name of the API key that it came with, or ""."""
