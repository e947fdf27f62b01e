"""Which requests are for models, and which model each is for: by a field of the body, of the query, or by the path.

What is not in the table is not passed on, whatever an engine would answer: engines trust whoever reaches them with their
control (/sleep, /collective_rpc, /v1/load_lora_adapter). Paths are compared as they are, so nothing that an engine might take
for another path (//sleep, /x/../sleep, /%73leep) gets through. Programs that are no engine of ours (`command`, `external`) get
any path, under /upstream.
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.relay.document import find_names, rewrite
from mmd.gateway.relay.form import FormError, find_fields
from mmd.gateway.relay.head import RequestHead

__all__ = ["ROUTES", "Aim", "Route", "find_route"]

_POST: Final = frozenset((b"POST",))
_GET: Final = frozenset((b"GET", b"HEAD"))
_UPSTREAM: Final = b"/upstream/"
_RESPONSES: Final = b"/v1/responses/"
_KEPT_ANSWER: Final = re.compile(rb"/v1/responses/[A-Za-z0-9_-]+(?:/cancel|/input_items)?")
_ACTIONS: Final = frozenset({("", b"GET"), ("", b"HEAD"), ("", b"DELETE"), ("cancel", b"POST"), ("input_items", b"GET")})


class Aim(NamedTuple):
    """Where a request goes, and as what."""

    model: Model
    stream: bool
    """An event stream is asked for."""
    body: bytes
    target: bytes
    name: str
    """What the client calls the model, or the adapter of it that it means."""


def _named(name: object, config: Config) -> Model:
    if not isinstance(name, str) or not name:
        raise ApiError(400, 'the request names no model: set "model"', code="model_required", param="model")
    model = config.models.get(name) or config.resolve(name)
    if model is None:
        raise no_such_model(name, config)
    return model


def _name_at_engine(model: Model, name: str) -> str:
    """What the engine calls the model, or the adapter of it, that clients call `name`."""
    if name in model.lora:
        return name
    return model.model if model.engine is EngineKind.EXTERNAL else model.name


class Route:
    """How to tell the model of a request."""

    def __init__(self, methods: frozenset[bytes] = _POST, *, answers_are_kept: bool = False) -> None:
        """`answers_are_kept`: at the engine, where clients ask for them by their id later."""
        self.methods = methods
        self.answers_are_kept = answers_are_kept
        self.for_workers = True
        """Whether any process can tell the model."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        """ApiError 400 or 404 when the request names no model that exists. `kept`: ids of answers, and whose they are."""
        raise NotImplementedError


class ByBody(Route):
    """By `model` in a JSON document. It gets the model's own name, and the model's filters are applied to it."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        found = find_names(body)
        model = _named(found.model, config)
        name = str(found.model)
        at_engine = _name_at_engine(model, name)
        if name != at_engine or model.filters.strip or model.filters.set:
            body = rewrite(body, at_engine, model.filters)
        return Aim(model, found.stream is True, body, request.target, name)


class ByForm(Route):
    """By the field `model` of a form, which may hold files."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        try:
            fields = find_fields(request.field(b"content-type"), body)
        except FormError as error:
            raise ApiError(400, f"the body is no form: {error}", code="invalid_form") from error
        start, end = fields.get("model", (0, 0))
        name = body[start:end].decode("utf-8", "replace")
        model = _named(name, config)
        at_engine = _name_at_engine(model, name)
        if name != at_engine:
            body = body[:start] + at_engine.encode() + body[end:]
        streams = fields.get("stream", (0, 0))
        return Aim(model, body[streams[0] : streams[1]].lower() in (b"true", b"1"), body, request.target, name)


class ByQuery(Route):
    """By `model` in the target's query."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        query = parse_qsl(request.target.partition(b"?")[2].decode("ascii", "replace"), keep_blank_values=True)
        names = [value for key, value in query if key == "model"]
        if len(names) > 1:  # an engine may take the other one, which may not be this client's to use
            raise ApiError(400, "the request names more than one model", code="model_required", param="model")
        name = names[0] if names else ""
        model = _named(name, config)
        at_engine = _name_at_engine(model, name)
        target = request.target
        if name != at_engine:
            renamed = [(key, at_engine if key == "model" else value) for key, value in query]
            target = request.path + b"?" + urlencode(renamed, quote_via=quote).encode()
        return Aim(model, stream=False, body=body, target=target, name=name)


class ByPath(Route):
    """By what follows /upstream/; the rest is the path at the engine. Of names that fit the longest counts."""

    def __init__(self) -> None:
        super().__init__(frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")))

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        path, question, query = request.target[len(_UPSTREAM) :].partition(b"?")
        parts = path.split(b"/")
        for count in range(len(parts), 0, -1):
            model = config.resolve(unquote(b"/".join(parts[:count]).decode("ascii", "replace")))
            if model is not None:
                rest = b"/" + b"/".join(parts[count:])
                _permit(model, request, rest)
                # Not the name of an adapter: what follows may ask for any of the model's.
                return Aim(model, stream=False, body=body, target=rest + question + query, name=model.name)
        raise no_such_model(unquote(parts[0].decode("ascii", "replace")), config)


class ById(Route):
    """By the id of an answer that a model's engine keeps: /v1/responses/ID, and what may follow."""

    def __init__(self) -> None:
        super().__init__(_GET | {b"POST", b"DELETE"})
        self.for_workers = False

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: Mapping[str, str]) -> Aim:
        name, _, action = request.path[len(_RESPONSES) :].decode("ascii", "replace").partition("/")
        model = config.models.get(kept.get(name, ""))
        if model is None or (action, request.method) not in _ACTIONS:
            words = f"there is no response {name!r} here" if model is None else f"a response has no {action!r} of that kind"
            raise ApiError(404, words, code="not_found")
        return Aim(model, b"stream=true" in request.target, body, request.target, model.name)


def _permit(model: Model, request: RequestHead, path: bytes) -> None:
    """404 for what clients may not reach at an engine of ours."""
    if model.engine in (EngineKind.COMMAND, EngineKind.EXTERNAL):
        return
    route = ROUTES.get(path)
    if route is None and _KEPT_ANSWER.fullmatch(path):
        route = _id
    allowed = route.methods if route is not None else _GET if path in _READABLE else frozenset[bytes]()
    if request.method not in allowed:
        words = f"{request.method.decode()} {path.decode('ascii', 'replace')} of {model.name} is not open to clients"
        raise ApiError(404, words, code="not_found")


_body, _form, _query, _path = ByBody(), ByForm(), ByQuery(_GET), ByPath()
_id: Final = ById()

_BY_BODY: Final = (
    b"/v1/chat/completions",
    b"/v1/completions",
    b"/v1/messages",
    b"/v1/messages/count_tokens",
    b"/v1/embeddings",
    b"/v2/embed",
    b"/rerank",
    b"/v1/rerank",
    b"/v2/rerank",
    b"/reranking",
    b"/v1/reranking",
    b"/score",
    b"/v1/score",
    b"/classify",
    b"/pooling",
    b"/tokenize",
    b"/detokenize",
    b"/v1/audio/speech",
    b"/v1/images/generations",
    b"/infill",
    b"/completion",
    b"/sdapi/v1/txt2img",
    b"/sdapi/v1/img2img",
)
_BY_FORM: Final = (b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/images/edits", b"/v1/images/variations")
_BY_QUERY: Final = (b"/v1/realtime", b"/v1/audio/voices", b"/props")
_READABLE: Final = frozenset((b"/health", b"/version", b"/v1/models", b"/metrics", b"/load", b"/tokenizer_info"))

ROUTES: Final[dict[bytes, Route]] = {
    **dict.fromkeys(_BY_BODY, _body),
    b"/v1/responses": ByBody(answers_are_kept=True),
    **dict.fromkeys(_BY_FORM, _form),
    **dict.fromkeys(_BY_QUERY, _query),
}
"""By path."""


def find_route(path: bytes) -> Route | None:
    """The route of a path that is not in ROUTES; None: it is not for models."""
    if path.startswith(_UPSTREAM):
        return _path
    return _id if path.startswith(_RESPONSES) else None
