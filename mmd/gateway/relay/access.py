"""Which API key came with a request: looked up once for a head that comes again and again, and never passed on.

A key comes as `Authorization: Bearer KEY`, as `x-api-key: KEY`, or, since browsers set no fields of a WebSocket's, as OpenAI's
subprotocol `openai-insecure-api-key.KEY`. None of them reaches an engine (relay.head).
"""

from collections.abc import Callable
from typing import Final

from mmd.gateway.relay.head import KEY_PROTOCOL, RequestHead
from mmd.gateway.relay.visitor import NO_KEY, TWO_KEYS, UNKNOWN_KEY, Visitor
from mmd.keys import KeyRing

__all__ = ["Access"]

_BEARER: Final = b"bearer "


class Access:
    """Without a ring it is open to everybody: there is no file of keys."""

    def __init__(self) -> None:
        self.ring = KeyRing()
        self.required = False
        """Whether clients need a key."""
        self._visitors: dict[str, Visitor] = {}
        """By the names of their keys."""
        self._nobody = Visitor(None, NO_KEY)
        self._unknown = Visitor(None, UNKNOWN_KEY)
        self._torn = Visitor(None, TWO_KEYS)
        self.changed: list[Callable[[], None]] = []
        """Are called when other keys are in force."""
        self._edition = object()
        """Another one for each ring: what a head has been looked up in."""

    def use(self, ring: KeyRing) -> None:
        """From now on these are the keys. A key that stays keeps what is counted of it."""
        visitors: dict[str, Visitor] = {}
        for key in ring.keys:
            visitor = self._visitors.get(key.name)
            if visitor is None or visitor.key is None or visitor.key.sha256 != key.sha256:
                visitor = Visitor(key)
            else:
                visitor.renew(key)
            visitors[key.name] = visitor
        for visitor in self._visitors.values():
            if visitor.key is None or visitors.get(visitor.key.name) is not visitor:
                visitor.revoke()
        self._visitors = visitors
        self.ring, self.required, self._edition = ring, ring.required, object()
        for tell in tuple(self.changed):
            tell()

    def visitor(self, request: RequestHead) -> Visitor:
        """Who asks. Heads are remembered by their bytes, and with them who they are from."""
        if request.edition is self._edition and request.visitor is not None:
            return request.visitor
        visitor = self._find(request)
        request.is_from(visitor, self._edition)
        return visitor

    def named(self, name: str) -> Visitor | None:
        """The one whose key has this name."""
        return self._visitors.get(name)

    def count_elsewhere(self, name: str, more: int) -> None:
        """Gateways before this one have so many more requests of a key under way, or, below 0, fewer."""
        visitor = self._visitors.get(name)
        if visitor is not None:
            visitor.elsewhere = max(0, visitor.elsewhere + more)

    def visitors(self) -> list[Visitor]:
        return list(self._visitors.values())

    def _find(self, request: RequestHead) -> Visitor:
        presented = _presented(request)
        if not presented:
            return self._nobody
        if len(presented) > 1:
            return self._torn
        key = self.ring.find(presented.pop())
        return self._unknown if key is None else self._visitors[key.name]


def _presented(request: RequestHead) -> set[bytes]:
    found: set[bytes] = set()
    for name, _, value in request.fields:
        if name == b"authorization" and value[: len(_BEARER)].lower() == _BEARER:
            found.add(value[len(_BEARER) :].strip())
        elif name == b"x-api-key":
            found.add(value.strip())
        elif name == b"sec-websocket-protocol":
            offered = (each.strip() for each in value.split(b","))
            found.update(each[len(KEY_PROTOCOL) :] for each in offered if each[: len(KEY_PROTOCOL)] == KEY_PROTOCOL)
    found.discard(b"")
    return found
