"""Fields of the bodies that clients send: texts, numbers, and fields that go by several names."""

import json
from collections.abc import Mapping
from typing import Any

from mmd.sim.errors import BadRequestError

__all__ = ["content_text", "one_of", "texts", "whole"]

_MOST_DIGITS = 18


def texts(given: object, name: str) -> list[str]:
    """A string, a list of tokens or a list of either, as texts; BadRequestError names the field."""
    single = isinstance(given, str) or (isinstance(given, list) and all(isinstance(token, int) for token in given))
    several = [given] if single and given != [] else given
    if not isinstance(several, list) or not several:
        raise BadRequestError(f"{name}: a string, a list of tokens or a list of either is required", param=name)
    return [content_text(one) for one in several]


def content_text(content: object) -> str:
    """The text of a message's content: a string, a list of parts (pictures are left out) or of token numbers, or nothing."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return " ".join(_part(part) if isinstance(part, dict) else str(part) for part in content)
        case _:
            raise BadRequestError(f"content: expected a string or a list, got {json.dumps(content)}")


def _part(part: Mapping[str, Any]) -> str:
    # Anthropic's tool_result has a content of its own.
    return str(part["text"]) if "text" in part else content_text(part.get("content"))


def whole(body: Mapping[str, Any], name: str, *, default: int, lowest: int = 1, highest: int) -> int:
    """An integer of a JSON body or, as a string, of a form or a query; BadRequestError."""
    given = body.get(name)
    if given is None:
        return default
    if isinstance(given, str) and given.isdecimal() and len(given) <= _MOST_DIGITS:
        given = int(given)
    if type(given) is not int or not lowest <= given <= highest:
        raise BadRequestError(f"{name}: expected an integer from {lowest} to {highest}, got {json.dumps(given)}", param=name)
    return given


def one_of(body: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that has a value."""
    return next((body[name] for name in names if body.get(name) is not None), None)
