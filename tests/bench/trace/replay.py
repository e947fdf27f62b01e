"""The load: one asyncio process that sends a trace, open loop and streamed, to an OpenAI endpoint.

Every request has a connection of its own: some of the programs measured tie a connection to the model that it first asked for.
Times to the first token count from when a request was due, so that a load generator that falls behind makes figures worse, not
better; `Outcome.late_s` tells how far it did.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from workload import Request, Trace

__all__ = ["Outcome", "replay", "wait_until_answers"]

_LIMIT_S = 600.0
"""How long a request may take, at scale 1; the longest good answer is under a minute."""
_LIMIT_LEAST_S = 30.0
_STARTS_WITHIN_S = 30.0
_POLL_S = 0.05
_TAIL_BYTES = 2048
"""The last events of an answer: one chunk is about 250 bytes."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request. Times at scale 1."""

    model: int
    at_s: float
    first_token_s: float | None
    error: str
    """What went wrong, or ""."""
    late_s: float
    """How much later than due it was sent."""


def replay(trace: Trace, url: str, models: Sequence[str], *, scale: float, tokens_per_s: float) -> list[Outcome]:
    """Send a trace to the API at `url` and wait for the answers; at scale 0.1 everything happens ten times as fast."""
    return asyncio.run(_replay(trace, f"{url}/v1/chat/completions", models, scale, tokens_per_s))


async def _replay(trace: Trace, url: str, models: Sequence[str], scale: float, tokens_per_s: float) -> list[Outcome]:
    loop = asyncio.get_running_loop()
    timeout = aiohttp.ClientTimeout(total=max(_LIMIT_S * scale, _LIMIT_LEAST_S))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        begun = loop.time()
        tasks = []
        for request in trace.requests:
            due = begun + request.at_s * scale
            await asyncio.sleep(due - loop.time())
            tokens = max(1, round(request.decode_s * scale * tokens_per_s))
            body = _body(models[request.model], tokens)
            tasks.append(group.create_task(_ask(session, url, body, request, due, scale)))
    return [task.result() for task in tasks]


def _body(model: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}


async def _ask(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], request: Request, due: float, scale: float
) -> Outcome:
    loop = asyncio.get_running_loop()
    late_s, first_s, error = loop.time() - due, None, ""
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                error = f"HTTP {answer.status}: {_message(await answer.text())}"
            else:
                stream = _Stream()
                async for data in answer.content.iter_any():
                    stream.feed(data)
                    if stream.begun and first_s is None:
                        first_s = loop.time() - due
                error = stream.problem()
    except (aiohttp.ClientError, TimeoutError) as gone:
        error = str(gone) or type(gone).__name__
    return Outcome(request.model, request.at_s, None if first_s is None else first_s / scale, error, late_s / scale)


def _message(text: str) -> str:
    """Of an error in OpenAI's shape, else the text itself."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:200]


class _Stream:
    """A streamed answer: whether a token has come, and whether the end is a good one. The middle is not looked at."""

    def __init__(self) -> None:
        self.begun = False
        self._tail = b""

    def feed(self, data: bytes) -> None:
        self._tail += data
        if self.begun:
            self._tail = self._tail[-_TAIL_BYTES:]
        else:
            self.begun = any(choice.get("delta", {}).get("content") for choice in self._choices())

    def problem(self) -> str:
        for event in self._events():
            if "error" in event:
                return f"in the stream: {_message(json.dumps(event))}"
        if b"data: [DONE]" not in self._tail:
            return "cut off"
        if any(choice.get("finish_reason") == "abort" for choice in self._choices()):
            return "aborted by the engine"
        return "" if self.begun else "no token"

    def _choices(self) -> list[dict[str, Any]]:
        return [choice for event in self._events() for choice in event.get("choices", ())]

    def _events(self) -> list[dict[str, Any]]:
        """Those that are whole: the first and the last line may not be."""
        events = []
        for line in self._tail.split(b"\n"):
            with suppress(ValueError):
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
        return events


def wait_until_answers(url: str) -> None:
    """Wait until the API lists its models, so that nothing but models starts during a trace. TimeoutError."""
    asyncio.run(_wait_until_answers(f"{url}/v1/models"))


async def _wait_until_answers(url: str) -> None:
    deadline_s, last = time.monotonic() + _STARTS_WITHIN_S, ""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_STARTS_WITHIN_S)) as session:
        while time.monotonic() < deadline_s:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
                    last = f"HTTP {answer.status}"
            except aiohttp.ClientError as error:
                last = str(error)
            await asyncio.sleep(_POLL_S)
    raise TimeoutError(f"{url} does not answer: {last}")
