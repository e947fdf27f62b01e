"""What a simulated engine refuses: exceptions that know their status, and answers in vLLM's shape."""

from aiohttp import web

__all__ = ["ApiError", "BadRequestError", "NotFoundError", "RefusedError", "error_answer", "error_body"]


class ApiError(Exception):
    """An answer that is an error; the message is for the client."""

    status = 500
    kind = "InternalServerError"
    """vLLM's name for it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequestError(ApiError):
    """The request is wrong."""

    status = 400
    kind = "BadRequestError"


class NotFoundError(ApiError):
    """It names a model or a response that there is not."""

    status = 404
    kind = "NotFoundError"


class RefusedError(ApiError):
    """A call that the engine refuses, or a request that a sleep cut off."""


def error_answer(error: ApiError, *, anthropic: bool = False) -> web.Response:
    """The answer for `error`: OpenAI's shape as vLLM fills it, or Anthropic's."""
    body = {"type": "error", "error": {"type": error.kind, "message": str(error)}} if anthropic else error_body(error)
    return web.json_response(body, status=error.status)


def error_body(error: ApiError) -> dict[str, object]:
    """In OpenAI's shape."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.status}}
