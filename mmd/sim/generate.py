"""Generation: a request's limits, and its tokens at the configured rate."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

from mmd.sim.engine import Engine
from mmd.sim.text import GARBAGE, answer, count_tokens

__all__ = ["BadRequestError", "Completion", "Job", "chat_job", "completion_jobs", "generate", "responses_job"]


class BadRequestError(Exception):
    """The request body is wrong; the message is for the client (status 400)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated."""

    prompt: str
    prompt_tokens: int
    max_tokens: int | None
    """None: until the answer ends by itself."""
    min_tokens: int = 0
    index: int = 0
    """Of the choice in the answer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One token (or, at the end, the reason why there are no more)."""

    text: str = ""
    finish_reason: str | None = None


def chat_job(body: Mapping[str, Any]) -> Job:
    """From a /v1/chat/completions body; BadRequestError."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRequestError("messages: a list of at least one message is required")
    texts = [_content(message.get("content")) for message in messages]
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    return _job(body, prompt=texts[-1], prompt_tokens=sum(map(count_tokens, texts)), max_tokens=limit)


def completion_jobs(body: Mapping[str, Any]) -> list[Job]:
    """From a /v1/completions body, one for each prompt; BadRequestError."""
    prompt = body.get("prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(token, int) for token in prompt))
    prompts = [prompt] if single else prompt
    if not isinstance(prompts, list) or not prompts:
        raise BadRequestError("prompt: a string, a list of tokens or a list of either is required")
    texts = [_content(one) for one in prompts]
    limit = body.get("max_tokens", 16)
    return [
        _job(
            body,
            prompt=text,
            prompt_tokens=len(one) if isinstance(one, list) else count_tokens(text),
            max_tokens=limit,
            index=i,
        )
        for i, (one, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def responses_job(body: Mapping[str, Any]) -> Job:
    """From a /v1/responses body; BadRequestError."""
    given = body.get("input")
    items = given if isinstance(given, list) else [{"content": given}]
    if not items or not all(isinstance(item, dict) for item in items):
        raise BadRequestError("input: a string or a list of items is required")
    texts = [_content(item.get("content")) for item in items]
    return _job(body, prompt=texts[-1], prompt_tokens=sum(map(count_tokens, texts)), max_tokens=body.get("max_output_tokens"))


def _content(content: object) -> str:
    """The text of a message's content: a string, a list of parts (pictures are left out) or of token numbers, or nothing."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return " ".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
        case _:
            raise BadRequestError(f"content: expected a string or a list, got {json.dumps(content)}")


def _job(body: Mapping[str, Any], *, prompt: str, prompt_tokens: int, max_tokens: object, index: int = 0) -> Job:
    if body.get("n") not in (None, 1):
        raise BadRequestError("n: only 1 is simulated")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise BadRequestError(f"max_tokens must be at least 1, got {json.dumps(max_tokens)}")
    floor = max_tokens if body.get("ignore_eos") and isinstance(max_tokens, int) else body.get("min_tokens") or 0
    if not isinstance(floor, int):
        raise BadRequestError(f"min_tokens: expected an integer, got {json.dumps(floor)}")
    return Job(prompt=prompt, prompt_tokens=prompt_tokens, max_tokens=max_tokens, min_tokens=floor, index=index)


async def generate(engine: Engine, job: Job) -> AsyncIterator[Completion]:
    """The tokens of `job`, paced, and last its finish reason."""
    natural, filler = answer(engine.options.model, job.prompt)
    length = max(len(natural), job.min_tokens)
    wanted = length if job.max_tokens is None else min(length, job.max_tokens)
    words = chain(natural, filler) if engine.weights_valid else repeat(GARBAGE)
    loop = asyncio.get_running_loop()
    rate = engine.options.tokens_per_second
    started, aborts = loop.time(), engine.aborts
    for number, word in enumerate(islice(words, wanted), start=1):
        if rate:
            await asyncio.sleep(max(0.0, started + number / rate - loop.time()))
        await engine.running()
        if engine.aborts != aborts:
            yield Completion(finish_reason="abort")
            return
        yield Completion(text=word)
    yield Completion(finish_reason="stop" if wanted >= len(natural) and not job.min_tokens else "length")
