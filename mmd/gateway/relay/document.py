"""JSON bodies of requests: what routing needs of them, found without building the document, and what is changed in them."""

import json
import re
from typing import Final

import msgspec

from mmd.config import Filters
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.fields import Routing, decode_fields, decode_routing, encode, raw
from mmd.quantity import format_size

__all__ = ["find_names", "rewrite"]

# json builds the whole document, on the event loop: a MiB costs about 30 MiB of memory and 30 ms at worst, 63 MiB of it cost
# 1.7 GB and a standstill of 1.7 s.
_SLOW_MAX_BYTES: Final = 1 << 20

# To write a document again, an object is made for each key at its top level: 250,000 cost 0.2 s and 50 MiB, 6 million 4.6 s.
# The keys below are not told apart from those, which would take a parser.
_KEYS_MAX: Final = 250_000
_KEY: Final = re.compile(rb'"[ \t\r\n]*:')


def find_names(body: bytes) -> Routing:
    """`model` and `stream`; ApiError 400 when the body is no JSON object."""
    try:
        return decode_routing(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        payload = _load(body, error)
        return Routing(payload.get("model"), payload.get("stream"))


def _load(body: bytes, why: Exception) -> dict[str, object]:
    """What json takes and msgspec does not: NaN and Infinity, halves of surrogate pairs, UTF-16 and UTF-32, a byte order mark.
    Otherwise ApiError says what is wrong. `why`: what msgspec says of it."""
    if len(body) > _SLOW_MAX_BYTES:
        message = (
            f"the body is not JSON: {why}; NaN, Infinity, halves of surrogate pairs and encodings other than UTF-8 "
            f"are taken in bodies of up to {format_size(_SLOW_MAX_BYTES)} only"
        )
        raise ApiError(400, message, code="invalid_json")
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return payload


def rewrite(body: bytes, model: str, filters: Filters) -> bytes:
    """The same document for `model`, with its filters applied; everything else in it stays as it was written, to the digit."""
    changes: dict[str, object] = {**filters.set, "model": model}
    if len(body) > _SLOW_MAX_BYTES and body.count(b":") > _KEYS_MAX and _has_too_many_keys(body):
        message = f"the body has more than {_KEYS_MAX} keys, too many to change it: ask for the model by its own name ({model})"
        raise ApiError(400, message, code="too_many_keys")
    try:
        fields = decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return _rewrite(body, changes, filters, error)
    for key in filters.strip:
        fields.pop(key, None)
    fields.update({key: raw(encode(value)) for key, value in changes.items()})
    return encode(fields)


def _has_too_many_keys(body: bytes) -> bool:
    return any(count > _KEYS_MAX for count, _ in enumerate(_KEY.finditer(body), 1))


def _rewrite(body: bytes, changes: dict[str, object], filters: Filters, why: Exception) -> bytes:
    """What msgspec does not take goes through json, which writes its numbers in its own way."""
    payload = {key: value for key, value in _load(body, why).items() if key not in filters.strip}
    try:
        return json.dumps({**payload, **changes}).encode()
    except RecursionError as error:
        raise ApiError(400, f"the body is nested too deeply: {error}", code="invalid_json") from error
