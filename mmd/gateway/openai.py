"""The OpenAI-compatible API apart from inference, which the relay serves (mmd.gateway.relay)."""

import time

from aiohttp import web

from mmd.config import Model
from mmd.gateway.api_error import no_such_model
from mmd.gateway.application import visitor_of
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.stage import model_state

__all__ = ["OpenAiApi"]


class OpenAiApi:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._since = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.list_models),
            web.get("/v1/models/{name:.+}", self.get_model),
            web.get("/health", self.health),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """200 while the gateway accepts requests."""
        return web.json_response({"status": "ok"})

    async def list_models(self, request: web.Request) -> web.Response:
        """Those that the client's key is good for."""
        visitor, models = visitor_of(request), self._dispatcher.config.models.values()
        names = ((model, name) for model in models for name in (model.name, *model.lora))
        found = [
            self._model_object(model, name, parent=visitor is None or visitor.may_see(model))
            for model, name in names
            if visitor is None or visitor.may_use(model, name)
        ]
        return web.json_response({"object": "list", "data": found})

    async def get_model(self, request: web.Request) -> web.Response:
        name, config, visitor = request.match_info["name"], self._dispatcher.config, visitor_of(request)
        if visitor is not None:
            config = visitor.view(config)
        model = config.resolve(name)
        if visitor is not None and visitor.confined and (model is None or not visitor.may_use(model, name)):
            raise visitor.no_such_model()
        if model is None:
            raise no_such_model(name, config)
        shown = name if name in model.lora else model.name
        return web.json_response(self._model_object(model, shown, parent=visitor is None or visitor.may_see(model)))

    def _model_object(self, model: Model, name: str, *, parent: bool) -> dict[str, object]:
        """OpenAI's fields, vLLM's `parent` (whose adapter it is, if the client may know), and what else it may want to show."""
        return {
            "id": name,
            "object": "model",
            "created": self._since,
            "owned_by": "mmd",
            "parent": model.name if parent and name in model.lora else None,
            "aliases": [] if name in model.lora else list(model.aliases),
            "description": model.description,
            "state": model_state(self._dispatcher.scheduler.state, model).value,
        }
