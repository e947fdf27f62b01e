"""Who asks, by the API key that came with the request: what it may use, and how much of that it does at present."""

import time
from math import isfinite
from typing import TYPE_CHECKING, Final

from mmd.gateway.api_error import ApiError
from mmd.keys import Key, KeyScope, Rate

if TYPE_CHECKING:
    from mmd.config import Config, Model

__all__ = ["NO_KEY", "TWO_KEYS", "UNKNOWN_KEY", "Visitor", "objection"]

NO_KEY: Final = "no API key came with the request: send Authorization: Bearer KEY, or x-api-key: KEY"
UNKNOWN_KEY: Final = "the API key is not known here; an administrator makes keys (mmdctl keys add NAME)"
TWO_KEYS: Final = "two different API keys came with the request: send one, as Authorization: Bearer KEY or as x-api-key: KEY"

# What the scheduler says of waiting and of room names the models that are in the way.
_OF_OTHERS: Final = {
    "queue_full": "too many requests wait for models",
    "never_fits": "the model does not fit into the memory that there is for it",
    "backing_off": "the model has failed to start, and is left alone for a while",
    "gpus_unreadable": "the GPUs cannot be read at present",
    "waited_too_long": "the model was not ready in time",
}

# For a key that may use an adapter only, where more would name the model that has it.
_OF_ADAPTERS: Final = "the model that has this adapter has failed, was stopped, or does not answer"

# When a request of a key that has as many under way as it may is worth trying again: nobody knows when one of them ends.
_AGAIN_S: Final = 1.0


class Visitor:
    """All requests that come with one key; or, without a `key`, those that come with none that is known, and `why`."""

    def __init__(self, key: Key | None, why: str = "") -> None:
        self.key = key
        self.in_flight = 0
        """Inference requests under way in this process, waiting ones among them."""
        self.elsewhere = 0
        """Those that the gateways before this one still answer."""
        self._why = why
        self._rate: Rate | None = None
        self._judged: dict[str, tuple[Model, bool]] = {}
        """Whether it may use a model, by each name that it was asked for by."""
        self._view: tuple[Config, Config] | None = None
        """A configuration, and what of it its key lets it see."""
        self.renew(key)

    def renew(self, key: Key | None) -> None:
        """The key's entry may say something else now. What has been counted against a limit that stays is counted still."""
        self.key = key
        limit = None if key is None else key.rate
        if limit is None or self._rate is None or self._rate.limit != limit:
            self._rate = None if limit is None else Rate(limit)
        self._judged.clear()
        self._view = None

    def revoke(self) -> None:
        """The key is none any more, also for a request whose head has come but not yet its body."""
        self.key, self._why, self._rate = None, UNKNOWN_KEY, None

    @property
    def limited(self) -> bool:
        """Whether its requests are counted, which one process does for all."""
        key = self.key
        return key is not None and (key.rate is not None or key.concurrency is not None)

    @property
    def admin(self) -> bool:
        return self.key is not None and self.key.scope is KeyScope.ADMIN

    @property
    def reader(self) -> bool:
        """Whether its key is good for a look at the admin API."""
        return self.key is not None and self.key.scope is not KeyScope.USE

    @property
    def tried(self) -> bool:
        """Whether something came with the request that is no key."""
        return self.key is None and self._why != NO_KEY

    def stranger(self) -> ApiError:
        """401, for somebody without a key. Nothing of what was sent is said again."""
        return ApiError(401, self._why, code="invalid_api_key")

    def may_use(self, model: "Model", name: str) -> bool:
        """Whether its key is good for `model`, which it calls `name`: a name of the model's, or one of its adapters."""
        key = self.key
        if key is None:
            return False
        if not key.models:
            return True
        known = self._judged.get(name)
        if known is None or known[0] is not model:
            known = self._judged[name] = model, key.allows(name, (model.name, *model.aliases))
        return known[1]

    def may_see(self, model: "Model") -> bool:
        return self.may_use(model, model.name)

    @property
    def owner(self) -> str:
        """What tells its key from others, also from a later one of the same name; "" without one."""
        return "" if self.key is None else f"{self.key.name} {self.key.sha256[:8].hex()}"

    def owns(self, owner: str | None) -> bool:
        """Whether it may ask for an answer with that owner (KeptAnswers.owner). Those without one are administrators'."""
        return owner is not None and (owner == self.owner if owner else self.admin)

    @property
    def confined(self) -> bool:
        """Whether its key is good for some models only. Of the others it must not learn that there are any."""
        return self.key is not None and bool(self.key.models)

    def view(self, config: "Config") -> "Config":
        """The configuration without models that its key is not good for: whoever is confined gets the answers that there would
        be if they did not exist. Of a model that it may use by the name of an adapter only, `enter` refuses the other names."""
        if not self.confined:
            return config
        if self._view is None or self._view[0] is not config:
            models = {name: model for name, model in config.models.items() if self._sees(model)}
            self._view = config, config._replace(models=models)
        return self._view[1]

    def _sees(self, model: "Model") -> bool:
        return self.may_see(model) or any(self.may_use(model, adapter) for adapter in model.lora)

    def no_such_model(self) -> ApiError:
        """404, for a model that its key is not good for, and for one that does not exist: the same to the letter."""
        message = "there is no model of that name for the API key {}; GET /v1/models lists those that there are"
        name = "" if self.key is None else self.key.name
        return ApiError(404, message.format(name), code="model_not_found", param="model")

    def enter(self, model: "Model", name: str, *, counted: bool) -> ApiError | None:
        """Begin a request, which ends with `leave`; or why not. `counted`: another gateway has let it in, and it moves on."""
        key = self.key
        if key is None:
            return self.stranger()
        if key.scope is KeyScope.READ:
            message = f"the API key {key.name} is for looking only; make one for inference: mmdctl keys add NAME"
            return ApiError(403, message, code="use_key_needed")
        if not self.may_use(model, name):
            return self.no_such_model()
        if not counted:
            most, rate = key.concurrency, self._rate
            if most is not None and self.in_flight + self.elsewhere >= most:
                return _too_many(f"the API key {key.name} has {most} requests under way, as many as it may", _AGAIN_S)
            if rate is not None:
                wait_s = rate.take(time.monotonic())
                if wait_s > 0:
                    return _too_many(f"the API key {key.name} may begin {rate.limit} requests", wait_s)
        self.in_flight += 1
        return None

    def leave(self) -> None:
        self.in_flight -= 1

    def veil(self, error: ApiError, model: "Model | None") -> ApiError:
        """As its key may see it: lines of engines' logs are for administrators, and names of other models not for those
        who are confined to some; nor that of `model`, which was asked for, for those who may only use an adapter of it."""
        if self.confined and error.code == "model_not_found":
            return self.no_such_model()
        if self.key is None or self.admin or not (self.confined or error.tail):
            return error
        words = _OF_OTHERS.get(error.code, "") if self.confined else ""
        if (
            not words
            and model is not None
            and not self.may_see(model)
            and (model.name in error.message or model.id in error.message)
        ):
            words = _OF_ADAPTERS
        return ApiError(
            error.status,
            words or error.message,
            code=error.code,
            param=error.param,
            retry_after_s=error.retry_after_s,
            fields=error.fields,
        )

    # What moves from one gateway to the next.

    @property
    def full_at_s(self) -> float | None:
        """What is counted against its rate, see `Rate.full_at_s`; None: nothing, or it has none."""
        return self._rate.full_at_s if self._rate is not None and isfinite(self._rate.full_at_s) else None

    def resume(self, full_at_s: float) -> None:
        if self._rate is not None:
            self._rate.full_at_s = max(self._rate.full_at_s, full_at_s)


def objection(visitor: Visitor | None, model: "Model", name: str, *, required: bool) -> ApiError | None:
    """Why a request that was let in may not go on by the keys in force now, of which clients need one if `required`."""
    if visitor is None:
        return ApiError(401, NO_KEY, code="invalid_api_key") if required else None
    if visitor.key is None:
        return visitor.stranger()
    return None if visitor.may_use(model, name) else visitor.no_such_model()


def _too_many(message: str, wait_s: float) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
