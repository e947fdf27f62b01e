"""Errors as OpenAI's API shapes them: `{"error": {"message", "type", "param", "code"}}`, with Retry-After where it helps; for
clients of Anthropic's API as that does.

Source: platform.openai.com/docs/guides/error-codes. OpenAI's clients retry 408, 409, 429 and 5xx by themselves unless the
response says `x-should-retry: false`, which every failure that only a person can mend therefore does.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mmd.config import Config
from mmd.errors import MmdError
from mmd.policy.actions import Refusal, Refuse
from mmd.similar import Names

__all__ = ["NAME_MAX", "ApiError", "anthropic_body", "error_content", "no_such_model", "refused", "speaks_anthropic"]

_STATUS: Mapping[Refusal, int] = {
    Refusal.UNKNOWN_MODEL: 404,
    Refusal.REMOVED: 404,
    Refusal.ASLEEP: 409,
    Refusal.QUEUE_FULL: 503,
    Refusal.MODEL_BUSY: 429,
    Refusal.NEVER_FITS: 503,
    Refusal.START_FAILED: 503,
    Refusal.BACKING_OFF: 503,
    Refusal.STOPPED: 503,
    Refusal.GPUS_UNREADABLE: 503,
    Refusal.WAITED_TOO_LONG: 504,
}

# Of errors that are the client's but no mistake in its request.
_TYPES: Mapping[int, str] = {429: "rate_limit_error"}

NAME_MAX = 200
"""No name of a model is longer (mmd.kinds.NAME)."""

# Of the search for the name that a client may have meant: so much at once, and so much of the time in the long run.
_BUDGET_S = 0.1
_BUDGET_SHARE = 0.02

_ANTHROPIC = rb"/v1/messages(/count_tokens)?$"
_ANTHROPIC_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(MmdError):
    """A failure with an HTTP status. `retry_after_s` None means that trying again is of no use."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        tail: tuple[str, ...] = (),
        fields: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`tail`: the engine's last log lines; `fields`: further fields of the answer's head."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.tail = tail
        self.fields = fields

    def body(self) -> dict[str, object]:
        """The JSON body; the engine's last log lines, if there are any, end the message."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        message = "\n".join((self.message, *self.tail))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}  # RFC 9110, 11.6.1
        if self.retry_after_s is not None:
            return {**self.fields, "Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return {**self.fields, "x-should-retry": "false"} if self.status >= 500 or self.status == 409 else {**self.fields}

    def content(self, path: bytes = b"") -> bytes:
        """The JSON body for a client that asked for `path`: Anthropic's clients expect errors of their own shape."""
        return json.dumps(anthropic_body(self) if speaks_anthropic(path) else self.body()).encode()

    def event(self, path: bytes = b"") -> bytes:
        """The same as the end of a server-sent event stream whose 200 has gone out already."""
        if speaks_anthropic(path):
            return b"event: error\ndata: " + self.content(path) + b"\n\n"
        return b"data: " + self.content(path) + b"\n\ndata: [DONE]\n\n"


def speaks_anthropic(path: bytes) -> bool:
    """Whether this is a path of Anthropic's API, under /upstream as well."""
    return path.startswith((b"/v1/messages", b"/upstream/")) and re.search(_ANTHROPIC, path) is not None


def anthropic_body(error: ApiError) -> dict[str, object]:
    """An error as Anthropic's API shapes it (docs.anthropic.com, errors)."""
    kind = _ANTHROPIC_KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": "\n".join((error.message, *error.tail))}}


def error_content(error: ApiError, path: bytes = b"") -> tuple[list[tuple[bytes, bytes, bytes]], bytes]:
    """An error as the relay writes it: fields (lower-case name, name, value), and the JSON body."""
    named = {"Content-Type": "application/json; charset=utf-8", **error.headers()}
    return [(name.lower().encode(), name.encode(), value.encode("latin-1")) for name, value in named.items()], error.content(
        path
    )


def refused(refusal: Refuse) -> ApiError:
    """The answer to a request that the scheduler turned away."""
    return ApiError(
        _STATUS[refusal.why],
        refusal.message,
        code=refusal.why.value,
        param="model" if _STATUS[refusal.why] == 404 else None,
        retry_after_s=refusal.retry_after_s,
        tail=refusal.tail,
    )


class _Known:
    """The names of the configuration that was asked about last, prepared for searches.

    A search takes 1 ms among 500 names and 6 ms among 5,000, during which no other request moves. So searches have a budget of
    time; who asks for unknown names faster than it refills is told that they do not exist, without a hint.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._config: Config | None = None
        self._names = Names(())
        self._budget_s = _BUDGET_S
        self._counted = clock()

    def nearest(self, name: str, config: Config) -> str | None:
        if self._config is not config:
            models = config.models.values()
            self._names = Names([*config.models, *(name for each in models for name in (*each.aliases, *each.lora))])
            self._config = config
        begun = self._clock()
        self._budget_s = min(_BUDGET_S, self._budget_s + (begun - self._counted) * _BUDGET_SHARE)
        self._counted = begun
        if self._budget_s <= 0:
            return None
        found = self._names.nearest(name, cutoff=0.5)
        self._budget_s -= self._clock() - begun
        return found


_known = _Known()


def no_such_model(name: str, config: Config) -> ApiError:
    """404, with the nearest name that does exist."""
    near = None
    if len(name) > NAME_MAX:
        name = f"{name[:NAME_MAX]}..."
    else:
        near = _known.nearest(name, config)
    hint = f"; did you mean {near!r}?" if near else "; GET /v1/models lists those that do"
    return ApiError(404, f"the model {name!r} does not exist{hint}", code="model_not_found", param="model")
