"""Heads that have been parsed before.

A head is a pure function of its bytes, and clients and engines send the same ones again and again: `KnownHeads` remembers what
came out, with the digits of Content-Length cut out of the key. That saves a third of what a request costs.

No credential is remembered, and none is compared with what another client sent: how long such a comparison takes would tell
how much of it is right. The value of one Authorization or X-Api-Key field is cut out of the key as well, and put into the copy
of the head that each request gets. A head with any other field that may hold a secret is parsed each time.
"""

import re
import secrets
from hashlib import blake2b
from hmac import compare_digest
from typing import Final, Generic, TypeVar

from mmd.gateway.relay.head import RequestHead, ResponseHead

__all__ = ["KnownHeads", "KnownRequests"]

_END: Final = b"\r\n\r\n"
_LENGTH_FIELD: Final = b"\r\ncontent-length: "
_LENGTH_MARK: Final = b"ength: "
_LENGTH_DIGITS: Final = 15

# Heads that are remembered, and their size: 256 KiB in all, with what they were parsed to about a MiB.
_KNOWN_MAX: Final = 128
_KNOWN_BYTES: Final = 2048

# How the fields that hold a credential are written by clients, without the first letters, which differ.
_KEY_MARKS: Final = (b"uthorization: ", b"-api-key: ", b"-Api-Key: ", b"-API-Key: ")
_KEY_FIELDS: Final = (b"authorization", b"x-api-key")
_KEY_BYTES: Final = 512

# What may be cut out: characters that neither end a field nor mean anything in a head. `Bearer KEY` has one space.
_KEY_CHARACTERS: Final = bytes(range(0x20, 0x7F))

# A digest of a credential that says nothing elsewhere. OpenSSL's functions, such as SHA-256, take longer for a few bytes.
_SALT: Final = secrets.token_bytes(16)

# What may be a secret by the name of its field, or is one by that of a parameter of the target.
_SECRET: Final = re.compile(
    rb"auth|cookie|credential|key|passw|secret|session|token|signature|websocket-protocol", re.IGNORECASE
)

# Fields with such a name that hold none: what browsers say of a WebSocket.
_NO_SECRETS: Final = frozenset((b"sec-websocket-key", b"idempotency-key"))

_H = TypeVar("_H", RequestHead, ResponseHead)


def _number(data: bytes, start: int) -> tuple[int, int]:
    """The number that begins at `start`, of `_LENGTH_DIGITS` at most, and where it ends: at `start` if there is none."""
    number, at = 0, start
    limit = min(len(data), start + _LENGTH_DIGITS)
    while at < limit and 0x30 <= (digit := data[at]) <= 0x39:  # ASCII; int() alone takes signs, white space and underscores
        number = 10 * number + digit - 0x30
        at += 1
    return number, at


class KnownHeads(Generic[_H]):
    """Heads that have been parsed before, by their bytes without the digits of Content-Length.

    Other digits do not change what any other byte of a head means, so that what llhttp accepted once it would accept again. The
    key is cut behind the first `ength: ` in it, so that it tells where the digits were.
    """

    def __init__(self) -> None:
        self._heads: dict[bytes, _H] = {}
        self._last: tuple[bytes, bytes, _H] | None = None
        """Of the head found last: what comes before the digits, what comes behind them, and what it means."""

    def find(self, data: bytes) -> tuple[_H, int | None, int] | None:
        """The head that `data` begins with, its Content-Length, and where it ends."""
        found = self.find_last(data)
        return self._find(data) if found is None else found

    def find_last(self, data: bytes) -> tuple[_H, int | None, int] | None:
        """The same, if it is the head that was found last."""
        if self._last is not None:
            before, behind, head = self._last
            at = len(before)
            if data[:at] == before:
                length, stop = _number(data, at)
                end = stop + len(behind)
                if stop > at and data[stop:end] == behind:
                    return head, length, end
        return None

    def _find(self, data: bytes) -> tuple[_H, int | None, int] | None:
        end = data.find(_END) + 4
        at = data.find(_LENGTH_MARK, 0, end) + 7
        if at < 7:
            whole = self._heads.get(data[:end])
            return None if whole is None else (whole, whole.length, end)
        length, stop = _number(data, at)
        head = self._heads.get(data[:at] + data[stop:end])
        if head is None or stop == at:
            return None
        self._last = data[:at], data[stop:end], head
        return head, length, end

    def learn(self, head: _H, data: bytes) -> None:
        """Remember the head that `data`, all of it and nothing more, was parsed to."""
        if len(data) > _KNOWN_BYTES:
            return
        at = data.find(_LENGTH_MARK) + 7
        if at >= 7:
            stop = data.find(b"\r", at)
            if data[at - len(_LENGTH_FIELD) : at].lower() != _LENGTH_FIELD or not data[at:stop].isdigit():
                return
            data = data[:at] + data[stop:]
        if len(self._heads) >= _KNOWN_MAX:
            self._heads.clear()
        self._heads[data] = head


class KnownRequests:
    """Heads of requests. Those with a credential are looked up without it, and a copy with it is what is found."""

    def __init__(self) -> None:
        self._open: KnownHeads[RequestHead] = KnownHeads()
        self._keyed: KnownHeads[RequestHead] = KnownHeads()
        self._last: tuple[bytes, bytes, bytes, RequestHead] | None = None
        """Of the head with a credential found last, if its length follows: what comes before the one, between both, behind."""

    def find(self, data: bytes) -> tuple[RequestHead, int | None, int] | None:
        """As `KnownHeads.find`."""
        found = self._open.find_last(data)
        if found is not None:
            return found
        if self._last is not None:
            before, between, behind, head = self._last
            at = len(before)
            if data[:at] == before:
                stop = data.find(b"\r", at, at + _KEY_BYTES)
                digits = stop + len(between)
                if stop > 0 and data[stop:digits] == between:
                    length, digits_end = _number(data, digits)
                    end = digits_end + len(behind)
                    if digits_end > digits and data[digits_end:end] == behind and _is_key(key := data[at:stop]):
                        return _copy(head, head.key_index, key), length, end
        return self._find(data)

    def _find(self, data: bytes) -> tuple[RequestHead, int | None, int] | None:
        end = data.find(_END) + 4
        if end < 4:
            return None
        at = _key_start(data, end)
        if at < 0:
            return self._open.find(data)
        stop = data.find(b"\r", at, end)
        key, flat = data[at:stop], data[:at] + data[stop:end]
        found = self._keyed.find(flat) if _is_key(key) else None
        if found is None:
            return None
        head, length, _ = found
        digits = flat.find(_LENGTH_MARK) + len(_LENGTH_MARK)
        if digits > at:
            self._last = data[:at], flat[at:digits], flat[_number(flat, digits)[1] :], head
        return _copy(head, head.key_index, key), length, end

    def learn(self, head: RequestHead, data: bytes) -> None:
        """As `KnownHeads.learn`; a head whose secrets cannot be told apart from the rest of it is not remembered."""
        secret = [index for index, field in enumerate(head.fields) if _SECRET.search(field[0]) and field[0] not in _NO_SECRETS]
        # Proxy-Authorization is not among the fields; http://user:password@host/ is a target as well.
        if b"\r\nproxy-auth" in data.lower() or b"@" in (head.host or b""):
            return
        if _SECRET.search(head.target.partition(b"?")[2]) or _SECRET.search(head.field(b"referer").partition(b"?")[2]):
            return
        at = _key_start(data, len(data))
        if not secret and at < 0:
            self._open.learn(head, data)
        if len(secret) != 1 or at < 0:
            return
        lower, name, value = head.fields[secret[0]]
        stop = data.find(b"\r", at)
        line = b"\r\n%b: " % name
        whole = data[at - len(line) : at] == line and data[at:stop] == value
        if lower in _KEY_FIELDS and whole and _is_key(value):
            self._keyed.learn(_copy(head, secret[0], b""), data[:at] + data[stop:])


def _is_key(value: bytes) -> bool:
    """Whether a credential may be cut out, and another one put in its place."""
    edged = value[:1] in (b"", b" ") or value[-1:] == b" "
    return not edged and len(value) <= _KEY_BYTES and not value.translate(None, _KEY_CHARACTERS) and value.count(b" ") <= 1


def _copy(head: RequestHead, index: int, key: bytes) -> RequestHead:
    """The same head with another credential in the field at `index`; an engine's lines hold none. Whose it is has to be found
    out anew, if it is not the one that came with this head the last time, which is known by its digest."""
    copy = RequestHead()
    copy.fields = fields = head.fields.copy()
    lower, name, _ = fields[index]
    fields[index] = lower, name, key
    copy.key_index = index
    copy.length, copy.chunked, copy.keep_alive, copy.version = head.length, head.chunked, head.keep_alive, head.version
    copy.tokens, copy.upgrade = head.tokens, head.upgrade
    copy.method, copy.target, copy.path, copy.host = head.method, head.target, head.path, head.host
    copy.continues, copy.id_line, copy.engine_lines = head.continues, head.id_line, head.engine_lines
    copy.forwarded_lines = head.forwarded_lines
    copy.origin, copy.needs_leave, copy.wait = head.origin, head.needs_leave, head.wait
    if key:
        copy.known, copy.key_digest = head, blake2b(key, key=_SALT, digest_size=16).digest()
        if head.edition is not None and compare_digest(copy.key_digest, head.key_digest):
            copy.visitor, copy.edition = head.visitor, head.edition
    return copy


def _key_start(data: bytes, end: int) -> int:
    """Behind the first of the marks that is in a head; -1: none is."""
    for mark in _KEY_MARKS:
        at = data.find(mark, 0, end)
        if at >= 0:
            return at + len(mark)
    return -1
