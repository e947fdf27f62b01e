"""Requests on a model's own port: whatever they ask for, they are for that model.

Paths are as under /upstream: any for programs that are no engine of ours, those of clients for the others. Where a request may
name a model, it may name this one by any of its names, none at all, or one that nobody here has; what names another model is
refused, since a client that has mixed up two addresses would never notice.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.document import find_names, rewrite
from mmd.gateway.relay.form import FormError, find_fields
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.routing import ROUTES, Aim, ByBody, ByForm, ByQuery, Route, name_at_engine, permit

__all__ = ["PortRoute"]

_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
_POST: Final = b"POST"
_RESPONSES: Final = b"/v1/responses/"


class PortRoute(Route):
    """To the model of this name, whatever the request says."""

    def __init__(self, model: str, *, answers_are_kept: bool = False) -> None:
        super().__init__(_METHODS, answers_are_kept=answers_are_kept)
        self.keeps_host = True
        self._name = model

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        model = config.models.get(self._name)
        if model is None:
            message = f"the model {self._name!r} has been removed from the configuration"
            raise ApiError(404, message, code="model_not_found")
        permit(model, request, request.path)
        route = ROUTES.get(request.path)
        try:
            if isinstance(route, ByBody) and request.method == _POST:
                return _by_body(model, request, body, config)
            if isinstance(route, ByForm) and request.method == _POST:
                return _by_form(model, request, body, config)
            if isinstance(route, ByQuery):
                return _by_query(model, request, body, config)
        except _Foreign:
            pass  # a program's own idea of this path
        stream = request.path.startswith(_RESPONSES) and b"stream=true" in request.target
        return Aim(model, stream, body, request.target)


class _Foreign(Exception):  # noqa: N818 - not an error
    """The request is not what this path means to us, and its program is none that we know."""


def _lenient(model: Model) -> bool:
    """Whether it may mean something else by our paths."""
    return model.engine in (EngineKind.COMMAND, EngineKind.EXTERNAL)


def _at_engine(model: Model, name: object, config: Config) -> str:
    """What the engine is to be asked for, where the client said `name`."""
    if not isinstance(name, str) or not name:
        return name_at_engine(model, model.name)
    found = config.models.get(name) or config.resolve(name)
    if found is None:
        # Programs may know models of their own.
        return name if model.engine is EngineKind.COMMAND else name_at_engine(model, model.name)
    if found.name != model.name:
        message = f"this port serves {model.name} only, and not {name!r}"
        raise ApiError(404, message, code="model_not_found", param="model")
    return name_at_engine(model, name)


def _by_body(model: Model, request: RequestHead, body: bytes, config: Config) -> Aim:
    try:
        found = find_names(body)
    except ApiError:
        if _lenient(model):
            raise _Foreign from None
        raise
    at_engine = _at_engine(model, found.model, config)
    changed = bool(model.filters.strip or model.filters.set)
    if changed or (found.model != at_engine and not (found.model is None and model.engine is EngineKind.COMMAND)):
        body = rewrite(body, at_engine, model.filters)
    return Aim(model, found.stream is True, body, request.target)


def _by_form(model: Model, request: RequestHead, body: bytes, config: Config) -> Aim:
    try:
        fields = find_fields(request.field(b"content-type"), body)
    except FormError as error:
        if _lenient(model):
            raise _Foreign from None
        raise ApiError(400, f"the body is no form: {error}", code="invalid_form") from error
    start, end = fields.get("model", (0, 0))
    name = body[start:end].decode("utf-8", "replace")
    at_engine = _at_engine(model, name, config)
    streams = fields.get("stream", (0, 0))
    stream = body[streams[0] : streams[1]].lower() in (b"true", b"1")
    if end and name != at_engine:
        body = body[:start] + at_engine.encode() + body[end:]
    return Aim(model, stream, body, request.target)


def _by_query(model: Model, request: RequestHead, body: bytes, config: Config) -> Aim:
    query = parse_qsl(request.target.partition(b"?")[2].decode("ascii", "replace"), keep_blank_values=True)
    name = next((value for key, value in query if key == "model"), None)
    at_engine = _at_engine(model, name, config)
    if name == at_engine or (name is None and model.engine is EngineKind.COMMAND):
        return Aim(model, stream=False, body=body, target=request.target)
    renamed = [*((key, value) for key, value in query if key != "model"), ("model", at_engine)]
    target = request.path + b"?" + urlencode(renamed, quote_via=quote).encode()
    return Aim(model, stream=False, body=body, target=target)
