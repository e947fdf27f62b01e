"""Errors as OpenAI's API shapes them: `{"error": {"message", "type", "param", "code"}}`, with Retry-After where it helps; for
clients of Anthropic's API as that does.

Source: platform.openai.com/docs/guides/error-codes. OpenAI's clients retry 408, 409, 429 and 5xx by themselves unless the
response says `x-should-retry: false`, which every failure that only a person can mend therefore does.
"""

import json
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from mmd.config import Config
from mmd.errors import MmdError
from mmd.policy.actions import Refusal, Refuse

__all__ = ["ApiError", "anthropic_body", "error_content", "no_such_model", "refused", "speaks_anthropic"]

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

_NAME_MAX = 200

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


def no_such_model(name: str, config: Config) -> ApiError:
    """404, with the nearest name that does exist."""
    names = [*config.models, *(other for model in config.models.values() for other in (*model.aliases, *model.lora))]
    if len(name) > _NAME_MAX:  # nobody's name: to look for its nearest would take seconds
        name = f"{name[:_NAME_MAX]}..."
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/models lists those that do"
    return ApiError(404, f"the model {name!r} does not exist{hint}", code="model_not_found", param="model")
