"""Requests on a model's own port: whatever they ask for, they are for that model.

Paths are as under /upstream: any for programs that are no engine of ours, those of clients for the others. Where a request may
name a model, it may name this one by any of its names, none at all, or one that nobody here has; what names another model is
refused, since a client that has mixed up two addresses would never notice.
"""

from typing import Final

from mmd.config import Config, EngineKind, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.head import RequestHead
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.relay.routing import ROUTES, Aim, Route, permitted, refuse_dot_segments

__all__ = ["PortRoute"]

_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))


class PortRoute(Route):
    """To the model of this name, whatever the request says."""

    def __init__(self, model: str, *, answers_are_kept: bool = False) -> None:
        super().__init__(_METHODS, answers_are_kept=answers_are_kept)
        self.own_origin = self.keeps_host = True
        self._name = model

    def aim(self, request: RequestHead, body: bytes, config: Config, kept: KeptAnswers) -> Aim:
        model = config.models.get(self._name)
        if model is None:
            message = f"the model {self._name!r} has been removed from the configuration"
            raise ApiError(404, message, code="model_not_found")
        if model.engine in (EngineKind.COMMAND, EngineKind.EXTERNAL):
            refuse_dot_segments(request.target)
            return self._aim_at_program(model, request, body, config)
        route = permitted(model, request, request.target)
        self._check(model, route.named(request, body), config)
        return route.aim_at(model, request, body, request.target)

    def _aim_at_program(self, model: Model, request: RequestHead, body: bytes, config: Config) -> Aim:
        """It may mean something else by our paths, and know models of its own: what is no change by the configuration stays."""
        as_it_is = model, False, body, request.target, model.name
        route = ROUTES.get(request.path)
        if route is None or request.method not in route.methods:
            return as_it_is
        try:
            name = route.named(request, body)
        except ApiError:
            return as_it_is
        known = self._check(model, name, config)
        aim = route.aim_at(model, request, body, request.target)
        if known or model.engine is EngineKind.EXTERNAL or model.filters.strip or model.filters.set:
            return aim
        return model, aim[1], body, request.target, model.name

    def _check(self, model: Model, name: object, config: Config) -> bool:
        """Whether the request names this model; ApiError 404 when it names another one."""
        found = config.resolve(name) if isinstance(name, str) and name else None
        if found is not None and found.name != model.name:
            message = f"this port serves {model.name} only, and not {name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return found is not None
