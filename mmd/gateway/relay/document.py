"""JSON bodies of requests: what routing needs of them, found without building the document, and what is changed in them."""

import json

import msgspec

from mmd.config import Filters
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.fields import Routing, decode_fields, decode_routing, encode, raw

__all__ = ["find_names", "rewrite"]


def find_names(body: bytes) -> Routing:
    """`model` and `stream`; ApiError 400 when the body is no JSON object."""
    try:
        return decode_routing(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _decode(body)


def _decode(body: bytes) -> Routing:
    """What json takes and msgspec does not: NaN, UTF-16. Otherwise ApiError says what is wrong."""
    payload = _load(body)
    return Routing(payload.get("model"), payload.get("stream"))


def _load(body: bytes) -> dict[str, object]:
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
    try:
        fields = decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _rewrite(body, changes, filters)
    for key in filters.strip:
        fields.pop(key, None)
    fields.update({key: raw(encode(value)) for key, value in changes.items()})
    return encode(fields)


def _rewrite(body: bytes, changes: dict[str, object], filters: Filters) -> bytes:
    """What msgspec does not take goes through json, which writes its numbers in its own way."""
    payload = {key: value for key, value in _load(body).items() if key not in filters.strip}
    try:
        return json.dumps({**payload, **changes}).encode()
    except RecursionError as error:
        raise ApiError(400, f"the body is nested too deeply: {error}", code="invalid_json") from error
