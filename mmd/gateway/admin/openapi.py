"""The OpenAPI document (spec.openapis.org/oas/v3.1.0) of the admin API, made from its routes and the types of their answers."""

import re
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from types import UnionType
from typing import Any, Final, get_args

import msgspec

from mmd import __version__
from mmd.gateway.admin.route import EVENT_STREAM, Route

__all__ = ["document"]

_REFERENCE: Final = "#/components/schemas/{name}"

_ERROR: Final = {
    "description": "Errors have the shape of OpenAI's.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    wholes = [each for route in routes for each in (route.answer.type, route.body and route.body.type) if each is not None]
    types = [part for whole in wholes for part in _parts(whole)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    of_part = dict(zip(map(repr, types), schemas, strict=True))
    by_type = {repr(whole): _whole([of_part[repr(part)] for part in _parts(whole)]) for whole in wholes}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mmd administration",
            "version": __version__,
            "description": "What mmdctl(1) speaks, see mmd-gateway(8). Sizes are bytes, durations seconds, times Unix seconds.",
        },
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR}},
    }


def _parts(whole: Any) -> tuple[Any, ...]:
    """The types of a union, which msgspec only takes one by one."""
    return get_args(whole) if isinstance(whole, UnionType) else (whole,)


def _whole(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"oneOf": list(schemas)}


def _operation(route: Route, by_type: dict[str, Any]) -> dict[str, Any]:
    answer, body = route.answer, route.body
    described: dict[str, Any] = {
        "operationId": _identifier(route),
        "summary": route.summary,
        **({"description": route.description} if route.description else {}),
        "parameters": list(_parameters(route)),
        "responses": {
            str(answer.status): {"description": answer.description, "content": {answer.media: _content(route, by_type)}},
            **{str(status): _error(status) for status in _statuses(route)},
        },
    }
    if body is not None:
        example = {} if body.example is None else {"example": body.example}
        content = {media: {"schema": by_type[repr(body.type)], **example} for media in body.media}
        described["requestBody"] = {"description": body.description, "required": body.required, "content": content}
    return described


def _content(route: Route, by_type: dict[str, Any]) -> dict[str, Any]:
    """Of one line or one event where the answer is many: OpenAPI 3.1 has no words for that, 3.2 calls it `itemSchema`."""
    schema = by_type[repr(route.answer.type)]
    if route.answer.media == "application/json":
        return {"schema": schema}
    if route.answer.media == EVENT_STREAM:
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
        properties = {"id": {"type": "string"}, "event": {"type": "string"}, "data": data}
        return {"schema": {"description": "Of each event.", "type": "object", "properties": properties, "required": ["data"]}}
    return {"schema": {"type": "string", "description": "Each line is as `x-itemSchema` says."}, "x-itemSchema": schema}


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", route.path):
        what = "A name, an alias or a unit id" if name == "name" else "An id"
        schema = {"type": "string", "minLength": 1}
        described = f"{what}; a slash in it may be written as %2F."
        yield {"name": name, "in": "path", "required": True, "description": described, "schema": schema}
    for each in route.parameters:
        yield {"name": each.name, "in": each.place, "description": each.description, "schema": each.schema}


def _statuses(route: Route) -> Iterable[int]:
    """400: parameters, a body, or HTTP itself. 401 and 403: over TCP, where there are keys; see gateway.admin_auth."""
    return sorted({400, 401, 403, *route.errors})


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(name="Error")}}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _identifier(route: Route) -> str:
    words = re.sub(r"[{}]", "", route.path).removeprefix("/api/v1/").split("/")
    return "_".join([route.method.lower(), *words]).replace(".", "_")
