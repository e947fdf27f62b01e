"""What routing needs of a request's body: `model` and `stream`, found without building the document."""

import json
from typing import Final

import msgspec

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.relay.fields import Routing, decode_fields, decode_routing

__all__ = ["INFERENCE_PATHS", "find_model"]

INFERENCE_PATHS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


def find_model(body: bytes, config: Config) -> tuple[Model, bool, bytes]:
    """The model, whether a stream is asked for, and the body as the engine gets it, with the model's own name.

    ApiError 400 or 404 when the body does not name a model that exists.
    """
    try:
        found = decode_routing(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = _decode(body)
    name = found.model
    if not isinstance(name, str) or not name:
        raise ApiError(400, 'the body names no model: set "model"', code="model_required", param="model")
    model = config.models.get(name) or config.resolve(name)
    if model is None:
        raise no_such_model(name, config)
    upstream = model.model if model.engine is EngineKind.EXTERNAL else model.name
    return model, found.stream is True, body if name == upstream else _rename(body, upstream)


def _decode(body: bytes) -> Routing:
    """What json takes and msgspec does not: NaN, UTF-16. Otherwise ApiError says what is wrong."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return Routing(payload.get("model"), payload.get("stream"))


def _rename(body: bytes, name: str) -> bytes:
    """The same document for another model; everything else in it stays as it was written, to the digit."""
    try:
        fields = decode_fields(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return json.dumps({**json.loads(body), "model": name}).encode()
    fields["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)
