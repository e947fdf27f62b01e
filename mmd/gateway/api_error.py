"""Errors as OpenAI's API shapes them: `{"error": {"message", "type", "param", "code"}}`, with Retry-After where it helps.

Source: platform.openai.com/docs/guides/error-codes. OpenAI's clients retry 408, 409, 429 and 5xx by themselves unless the
response says `x-should-retry: false`, which every failure that only a person can mend therefore does.
"""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches

from mmd.config import Config
from mmd.errors import MmdError
from mmd.policy.actions import Refusal, Refuse

__all__ = ["ApiError", "error_content", "no_such_model", "refused"]

_STATUS: Mapping[Refusal, int] = {
    Refusal.UNKNOWN_MODEL: 404,
    Refusal.REMOVED: 404,
    Refusal.ASLEEP: 409,
    Refusal.QUEUE_FULL: 503,
    Refusal.NEVER_FITS: 503,
    Refusal.START_FAILED: 503,
    Refusal.BACKING_OFF: 503,
    Refusal.STOPPED: 503,
    Refusal.GPUS_UNREADABLE: 503,
    Refusal.WAITED_TOO_LONG: 504,
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
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.tail = tail

    def body(self) -> dict[str, object]:
        """The JSON body; the engine's last log lines, if there are any, end the message."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = "\n".join((self.message, *self.tail))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}  # RFC 9110, 11.6.1
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return {"x-should-retry": "false"} if self.status >= 500 or self.status == 409 else {}

    def content(self) -> bytes:
        return json.dumps(self.body()).encode()

    def event(self) -> bytes:
        """The same as the end of a server-sent event stream whose 200 has gone out already."""
        return b"data: " + self.content() + b"\n\ndata: [DONE]\n\n"


def error_content(error: ApiError) -> tuple[list[tuple[bytes, bytes, bytes]], bytes]:
    """An error as the relay writes it: fields (lower-case name, name, value), and the JSON body."""
    named = {"Content-Type": "application/json; charset=utf-8", **error.headers()}
    return [(name.lower().encode(), name.encode(), value.encode()) for name, value in named.items()], error.content()


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
    names = [*config.models, *(alias for model in config.models.values() for alias in model.aliases)]
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/models lists those that do"
    return ApiError(404, f"the model {name!r} does not exist{hint}", code="model_not_found", param="model")
