"""Which requests are for models, and which model each is for: by a field of the body, of the query, or by the path.

What is not in the table is not passed on, whatever an engine would answer: engines trust whoever reaches them with their
control (/sleep, /collective_rpc, /v1/load_lora_adapter). Paths are compared as they are, so nothing that an engine might take
for another path (//sleep, /x/../sleep, /%73leep) gets through. Programs that are no engine of ours (`command`, `external`) get
any path, under /upstream, but one that climbs.
"""

import re
from typing import Final
from urllib.parse import unquote

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import NAME_MAX, ApiError, no_such_model
from mmd.gateway.relay import query
from mmd.gateway.relay.document import find_names, rewrite
from mmd.gateway.relay.dot_segments import has_dot_segment
from mmd.gateway.relay.fields import Routing
from mmd.gateway.relay.form import FormError, Span, find_fields
from mmd.gateway.relay.head import RequestHead, ResponseHead
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.relay.location import relocate

__all__ = [
    "ROUTES",
    "Aim",
    "Route",
    "UnknownAnswerError",
    "find_route",
    "is_upstream",
    "not_taken",
    "permitted",
    "refuse_dot_segments",
]

_POST: Final = frozenset((b"POST",))
_GET: Final = frozenset((b"GET", b"HEAD"))
_UPSTREAM: Final = b"/upstream/"
_RESPONSES: Final = b"/v1/responses/"
_ANSWER: Final = re.compile(rb"/v1/responses/[A-Za-z0-9_-]+(?:/([a-z_]+))?")
_ACTIONS: Final[dict[str, frozenset[bytes]]] = {"": _GET | {b"DELETE"}, "cancel": _POST, "input_items": _GET}
"""What may be done with an answer that an engine keeps: what follows its id, and by which methods."""
_LEARNED_MAX: Final = 64
_TRUE: Final = frozenset((b"true", b"1", b"yes", b"on", b"t", b"y"))
"""In forms, as pydantic reads them."""


Aim = tuple[Model, bool, bytes, bytes, str]
"""Where a request goes, and as what: the model, whether an event stream is asked for, body and target as its engine gets them;
and what the client calls the model, or the adapter of it that it means and that is all it can reach by this.

A plain tuple, which compiled code takes apart without making it: every request has one.
"""


class UnknownAnswerError(ApiError):
    """No engine here keeps an answer by that id, as far as this process knows."""

    def __init__(self, answer: str) -> None:
        super().__init__(404, f"there is no response {answer!r} here, or not any more", code="not_found")
        self.answer = answer


def _named(name: object, config: Config) -> Model:
    if not isinstance(name, str) or not name:
        raise ApiError(400, 'the request names no model: set "model"', code="model_required", param="model")
    # A longer name is nobody's: it is neither compared with all aliases nor put into the answer.
    model = config.models.get(name) or config.resolve(name) if len(name) <= NAME_MAX else None
    if model is None:
        raise no_such_model(name, config)
    return model


def _name_at_engine(model: Model, name: str) -> str:
    """What the engine calls the model, or the adapter of it, that clients call `name`."""
    if name in model.lora:
        return name
    return model.model if model.engine is EngineKind.EXTERNAL else model.name


def not_taken(request: RequestHead, methods: frozenset[bytes]) -> ApiError:
    """405, with those that are taken."""
    path, method = request.path.decode("ascii", "replace"), request.method.decode()
    allowed = ", ".join(sorted(each.decode() for each in methods))
    return ApiError(405, f"{path} does not take {method}", code="method_not_allowed", fields={"Allow": allowed})


class Route:
    """How to tell the model of a request."""

    def __init__(self, methods: frozenset[bytes] = _POST, *, answers_are_kept: bool = False) -> None:
        """`answers_are_kept`: at the engine, where clients ask for them by their id later."""
        self.methods = methods
        self.answers_are_kept = answers_are_kept
        self.for_workers = True
        """Whether any process can tell the model."""
        self.own_origin = False
        """Whether all that is asked for in its origin is one engine's."""
        self.keeps_host = False
        """Whether a program (`command`) gets the client's Host: its pages compare that with the Origin of what they ask."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        """ApiError 400 or 404 when the request names no model that exists."""
        raise NotImplementedError

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        """The same request, for `model`, of which the path has told: what it says of a model itself is no matter."""
        return model, False, body, target, model.name

    def named(self, request: RequestHead, body: bytes) -> object:
        """The model that the request names, as it came: most of the time text, or None; ApiError 400 when it cannot be read."""
        return None

    def lines(self, request: RequestHead, target: bytes, host: bytes, head: ResponseHead) -> bytes:
        """The lines of an answer's head that tells of another place; `target`, `host`: what the engine was asked for."""
        return head.lines


class ByBody(Route):
    """By `model` in a JSON document. It gets the model's own name, and the model's filters are applied to it."""

    def __init__(self, *, answers_are_kept: bool = False) -> None:
        super().__init__(answers_are_kept=answers_are_kept)
        self._config: Config | None = None
        self._as_it_is: dict[str, Model] = {}
        """In that configuration: models whose documents pass as they are, by the names that they may have in these."""
        self._learned: dict[int, tuple[Config, dict[str, Model]]] = {}
        """The same of some configurations, by identity: keys that are confined have views of their own, and take turns."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        found = find_names(body)
        name = found.model
        if config is not self._config:
            self._learn(config)
        if isinstance(name, str):
            model = self._as_it_is.get(name)
            if model is not None:
                return model, found.stream is True, body, request.target, name
        named, stream, body, target, _ = self._aim_found(_named(name, config), found, body, request.target)
        return named, stream, body, target, str(name)

    def named(self, request: RequestHead, body: bytes) -> object:
        return find_names(body).model

    def _learn(self, config: Config) -> None:
        known = self._learned.get(id(config))
        if known is not None and known[0] is config:
            self._config, self._as_it_is = known
            return
        self._config, self._as_it_is = config, {}
        if len(self._learned) >= _LEARNED_MAX:
            self._learned.clear()
        self._learned[id(config)] = config, self._as_it_is
        for model in config.models.values():
            if not (model.filters.strip or model.filters.set):
                names = (model.name, *model.lora)
                self._as_it_is.update((name, model) for name in names if name == _name_at_engine(model, name))

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        return self._aim_found(model, find_names(body), body, target)

    def _aim_found(self, model: Model, found: Routing, body: bytes, target: bytes) -> Aim:
        """`found`: in the body, which is read once: 63 MiB take up to 0.2 s, during which nothing else moves."""
        filters, stream = model.filters, found.stream is True
        name = found.model if isinstance(found.model, str) and len(found.model) <= NAME_MAX else ""
        at_engine = _name_at_engine(model, name)
        if found.model != at_engine or filters.strip or filters.set:
            body = rewrite(body, at_engine, filters)
            if "stream" in filters.set:
                stream = filters.set["stream"] is True
            elif "stream" in filters.strip:
                stream = False
        return model, stream, body, target, model.name


class ByForm(Route):
    """By the field `model` of a form, which may hold files."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        (start, end), stream = _form(request, body)
        name = body[start:end].decode("utf-8", "replace")
        model = _named(name, config)
        return model, stream, _spliced(body, start, end, name, _name_at_engine(model, name)), request.target, name

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        (start, end), stream = _form(request, body)
        name = body[start:end].decode("utf-8", "replace")
        if start:  # otherwise there is no model in it, and the engine takes its own
            body = _spliced(body, start, end, name, _name_at_engine(model, name))
        return model, stream, body, target, model.name

    def named(self, request: RequestHead, body: bytes) -> object:
        (start, end), _ = _form(request, body)
        return body[start:end].decode("utf-8", "replace")


def _form(request: RequestHead, body: bytes) -> tuple[Span, bool]:
    """Where a form names its model, (0, 0) where it does not, and whether it asks for a stream."""
    types = [value for lower, _, value in request.fields if lower == b"content-type"]
    try:
        if len(types) > 1:
            raise FormError("there is more than one Content-Type")
        fields = find_fields(types[0] if types else b"", body)
        for name in ("model", "stream"):
            if len(fields.get(name, ())) > 1:
                raise FormError(f"the field {name!r} is given twice")
    except FormError as error:
        raise ApiError(400, f"the body is not a form that can be read: {error}", code="invalid_form") from error
    start, end = fields.get("stream", [(0, 0)])[0]
    return fields.get("model", [(0, 0)])[0], body[start:end].lower() in _TRUE


def _spliced(body: bytes, start: int, end: int, name: str, at_engine: str) -> bytes:
    return body if name == at_engine else body[:start] + at_engine.encode() + body[end:]


class ByQuery(Route):
    """By `model` in the target's query."""

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        name = query.find(request.target.partition(b"?")[2], "model")
        model = _named(name, config)
        return model, False, body, self._renamed(model, name, request.target), name

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        name = query.find(target.partition(b"?")[2], "model")
        return model, False, body, self._renamed(model, name, target), model.name

    def named(self, request: RequestHead, body: bytes) -> object:
        return query.find(request.target.partition(b"?")[2], "model")

    def _renamed(self, model: Model, name: str, target: bytes) -> bytes:
        at_engine = _name_at_engine(model, name)
        if name in ("", at_engine):
            return target
        path, _, parameters = target.partition(b"?")
        return path + b"?" + query.rename(parameters, at_engine)


class ByMethod(Route):
    """One way for POST, another one for GET."""

    def __init__(self, post: Route, get: Route) -> None:
        super().__init__(post.methods | get.methods)
        self._post = post
        self._get = get

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        return self._way(request).aim(request, body, config, kept)

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        return self._way(request).aim_at(model, request, body, target)

    def named(self, request: RequestHead, body: bytes) -> object:
        return self._way(request).named(request, body)

    def _way(self, request: RequestHead) -> Route:
        return self._post if request.method == b"POST" else self._get


class ByPath(Route):
    """By what follows /upstream/; the rest is the path at the engine. Of names that fit the longest counts."""

    def __init__(self) -> None:
        super().__init__(frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")))

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        path, question, parameters = request.target[len(_UPSTREAM) :].partition(b"?")
        # A path may have thousands of parts, names have a few.
        names = (name for model in config.models.values() for name in (model.name, *model.aliases, *model.lora))
        deepest = max((name.count("/") for name in names), default=0) + 1
        parts = path.split(b"/", deepest)
        for count in range(min(len(parts), deepest), 0, -1):
            model = config.resolve(unquote(b"/".join(parts[:count]).decode("ascii", "replace")))
            if model is not None:
                rest = b"/" + b"/".join(parts[count:])
                return self._aim(model, request, body, rest + question + parameters, bare=count == len(parts))
        raise no_such_model(unquote(parts[0].decode("ascii", "replace")), config)

    def _aim(self, model: Model, request: RequestHead, body: bytes, target: bytes, *, bare: bool) -> Aim:
        """`bare`: nothing follows the name."""
        if model.engine not in (EngineKind.COMMAND, EngineKind.EXTERNAL):
            return permitted(model, request, target).aim_at(model, request, body, target)
        refuse_dot_segments(target)
        if bare and request.method in _GET and not request.websocket:  # what a page there refers to is below it, not beside it
            path, question, parameters = request.target.partition(b"?")
            place = (path + b"/" + question + parameters).decode("latin-1")
            raise ApiError(307, f"{model.name} is at {place}", code="moved", fields={"Location": place})
        return model, False, body, target, model.name

    def lines(self, request: RequestHead, target: bytes, host: bytes, head: ResponseHead) -> bytes:
        return relocate(head, host, request.path.removesuffix(target.partition(b"?")[0]))


class ById(Route):
    """By the id of an answer that a model's engine keeps: /v1/responses/ID, and what may follow."""

    def __init__(self) -> None:
        super().__init__(_GET | {b"POST", b"DELETE"})
        self.for_workers = False

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        answer, _, action = request.path[len(_RESPONSES) :].decode("ascii", "replace").partition("/")
        methods = _ACTIONS.get(action)
        if methods is None:
            raise ApiError(404, f"a response has no {action[:NAME_MAX]!r}", code="not_found")
        if request.method not in methods:
            raise not_taken(request, methods)
        if len(answer) > NAME_MAX:
            raise ApiError(404, f"there is no response {answer[:NAME_MAX] + '...'!r}", code="not_found")
        model = config.models.get(kept.find(answer) or "")
        if model is None:
            raise UnknownAnswerError(answer)
        return self.aim_at(model, request, body, request.target)

    def aim_at(self, model: Model, request: RequestHead, body: bytes, target: bytes) -> Aim:
        stream = query.find(target.partition(b"?")[2], "stream").lower().encode() in _TRUE
        return model, stream, body, target, model.name


def refuse_dot_segments(target: bytes) -> None:
    """ApiError 400 for a path that may lead out of where a program was put, see mmd.gateway.relay.dot_segments."""
    if b"." in target or b"%" in target:  # all of them need one
        path = target.partition(b"?")[0]
        if has_dot_segment(path):
            raise ApiError(400, "the path has a segment that is, or may be read as, `.` or `..`", code="invalid_path")


def permitted(model: Model, request: RequestHead, target: bytes) -> Route:
    """The route of a path at an engine of ours; 404 for what clients may not reach there."""
    path = target.partition(b"?")[0]
    route = ROUTES.get(path)
    if route is None and path in _READABLE:
        route = _readable
    methods = route.methods if route is not None else None
    if route is None and (answer := _ANSWER.fullmatch(path)) is not None:
        route, methods = _id, _ACTIONS.get((answer[1] or b"").decode())
    if route is None or methods is None:
        words = f"{path.decode('ascii', 'replace')} of {model.name} is not open to clients"
        raise ApiError(404, words, code="not_found")
    if request.method not in methods:
        raise not_taken(request, methods)
    return route


_body, _form_route, _query, _path = ByBody(), ByForm(), ByQuery(_GET), ByPath()
_id: Final = ById()
_readable: Final = Route(_GET)

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
    b"/inference/v1/generate",
    b"/v1/responses/input_tokens",
    b"/v1/audio/speech",
    b"/v1/images/generations",
    b"/infill",
    b"/completion",
    b"/sdapi/v1/txt2img",
    b"/sdapi/v1/img2img",
)
_BY_FORM: Final = (b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/images/edits", b"/v1/images/variations")
_BY_QUERY: Final = (b"/v1/realtime", b"/props")
_READABLE: Final = frozenset((b"/health", b"/version", b"/v1/models", b"/metrics", b"/load", b"/tokenizer_info"))
"""Of an engine of ours, besides the routes."""

ROUTES: Final[dict[bytes, Route]] = {
    **dict.fromkeys(_BY_BODY, _body),
    b"/v1/responses": ByBody(answers_are_kept=True),
    **dict.fromkeys(_BY_FORM, _form_route),
    **dict.fromkeys(_BY_QUERY, _query),
    b"/v1/audio/voices": ByMethod(_form_route, _query),
}
"""By path."""


def is_upstream(path: bytes) -> bool:
    """Whether a path leads to whatever an engine has."""
    return path.startswith(_UPSTREAM)


def find_route(path: bytes) -> Route | None:
    """The route of a path that is not in ROUTES; None: it is not for models."""
    if path.startswith(_UPSTREAM):
        return _path
    return _id if path.startswith(_RESPONSES) else None
