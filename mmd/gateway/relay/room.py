"""Room for the bodies that wait here: gateway.max_buffered, and each client's share of it."""

from typing import Final

from mmd.config import Gateway
from mmd.gateway.workers import worker_count

__all__ = ["count_share", "has_room"]

# One client may have a quarter in any case.
_SHARE: Final = 4


def has_room(gateway: Gateway, held: int, own: int) -> bool:
    """Whether `held` bytes may be here together, of which `own` are one client's. With workers, each process has its part."""
    limit = max(gateway.max_body_bytes, gateway.max_buffered_bytes // worker_count(gateway.workers))
    share = max(gateway.max_body_bytes, limit // _SHARE)
    # Beyond its share a client takes only what leaves another one's share free.
    return held <= (limit if own <= share else limit - share)


def count_share(shares: dict[str, int], client: str, more: int) -> None:
    """`client` has `more` bytes here than before, or fewer."""
    now = shares.get(client, 0) + more
    if now:
        shares[client] = now
    else:
        shares.pop(client, None)
