"""What clients ask a simulated model to say: jobs, from the bodies of the text APIs."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmd.sim.errors import BadRequestError
from mmd.sim.fields import content_text, one_of, texts, whole
from mmd.sim.text import CONTEXT_TOKENS, count_tokens

__all__ = ["Job", "chat_jobs", "choices", "completion_jobs", "messages_job", "prompt_tokens", "responses_job"]

_MOST_CHOICES = 128
"""OpenAI's limit of `n`."""


class Job(NamedTuple):
    """One text that is to be generated. A named tuple like others that an engine always imports: it starts sooner."""

    model: str
    """As the client named it: the engine's own name, or an adapter's."""
    prompt: str
    prompt_tokens: int
    max_tokens: int | None = None
    """None: until the answer ends by itself."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    choice: int = 0
    """Its index in the answer."""


def chat_jobs(body: Mapping[str, Any], model: str) -> list[Job]:
    """From a /v1/chat/completions body, one for each of its `n` choices; BadRequestError."""
    said = _messages(body.get("messages"))
    tokens = sum(map(count_tokens, said))
    limit = one_of(body, "max_completion_tokens", "max_tokens")
    return [_job(body, model, said[-1], tokens, limit, choice=index) for index in range(choices(body))]


def completion_jobs(body: Mapping[str, Any], model: str, *, limit: str = "max_tokens", default: int | None = 16) -> list[Job]:
    """From a /v1/completions body, `n` for each prompt; BadRequestError. llama.cpp has another name for the limit."""
    prompts, number_of_choices = texts(body.get("prompt"), "prompt"), choices(body)
    given = body.get("prompt")
    if isinstance(given, list) and all(isinstance(one, list) for one in given):
        tokens = [len(one) for one in given]
    elif isinstance(given, list) and all(isinstance(one, int) for one in given):
        tokens = [len(given)]
    else:
        tokens = [count_tokens(text) for text in prompts]
    most = body.get(limit, default)
    return [
        _job(body, model, text, tokens[number], most, choice=number * number_of_choices + choice)
        for number, text in enumerate(prompts)
        for choice in range(number_of_choices)
    ]


def responses_job(body: Mapping[str, Any], model: str, *, earlier_tokens: int = 0) -> Job:
    """From a /v1/responses body; `earlier_tokens` of the conversation are remembered here. BadRequestError."""
    given = body.get("input")
    items = given if isinstance(given, list) else [{"content": given}]
    if given is None or not items or not all(isinstance(item, dict) for item in items):
        raise BadRequestError("input: a string or a list of items is required", param="input")
    said = [content_text(item.get("content", item.get("output"))) for item in items]
    instructions = body.get("instructions")
    tokens = earlier_tokens + sum(map(count_tokens, said)) + (count_tokens(str(instructions)) if instructions else 0)
    return _job(body, model, said[-1], tokens, body.get("max_output_tokens"))


def messages_job(body: Mapping[str, Any], model: str) -> Job:
    """From Anthropic's /v1/messages body; BadRequestError."""
    limit = body.get("max_tokens")
    if limit is None:
        raise BadRequestError("max_tokens: Field required", param="max_tokens")
    said = _messages(body.get("messages"))
    return _job(body, model, said[-1], prompt_tokens(body), limit, stop="stop_sequences")


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """Of a body with `messages`, Anthropic's `system` included; BadRequestError."""
    system = body.get("system")
    said = _messages(body.get("messages"))
    return sum(map(count_tokens, said)) + (count_tokens(content_text(system)) if system else 0)


def choices(body: Mapping[str, Any]) -> int:
    """How many answers to each prompt are asked for; BadRequestError."""
    return whole(body, "n", default=1, highest=_MOST_CHOICES)


def _messages(messages: object) -> list[str]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequestError("messages: a list of at least one message is required", param="messages")
    return [content_text(message.get("content")) for message in messages]


def _job(
    body: Mapping[str, Any], model: str, prompt: str, tokens: int, limit: object, *, choice: int = 0, stop: str = "stop"
) -> Job:
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise BadRequestError(f"max_tokens must be at least 1, got {json.dumps(limit)}", param="max_tokens")
    most = None if limit is None else min(limit, CONTEXT_TOKENS)
    floor = whole(body, "min_tokens", default=0, lowest=0, highest=CONTEXT_TOKENS)
    if body.get("ignore_eos") and most is not None:
        floor = most
    return Job(
        model=model,
        prompt=prompt,
        prompt_tokens=tokens,
        max_tokens=most,
        min_tokens=floor,
        stop=_stop(body.get(stop), stop),
        choice=choice,
    )


def _stop(given: object, name: str) -> tuple[str, ...]:
    several = [given] if isinstance(given, str) else given or []
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        raise BadRequestError(f"{name}: a string or a list of strings is required", param=name)
    return tuple(one for one in several if one)
