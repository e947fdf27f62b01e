"""The Responses API: the events of a streamed answer. The last one holds the whole response."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from mmd.sim.engine import Engine
from mmd.sim.generate import Job, generate

__all__ = ["response_events"]


async def response_events(engine: Engine, job: Job) -> AsyncIterator[dict[str, Any]]:
    """Events in OpenAI's order, numbered; `response.completed` (or `.incomplete`) is the last."""
    number = 0

    def event(kind: str, **fields: object) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": kind, "sequence_number": number - 1, **fields}

    response: dict[str, Any] = {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": engine.options.model,
        "status": "in_progress",
        "output": [],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    yield event("response.created", response=dict(response))
    yield event("response.in_progress", response=dict(response))
    item_id = f"msg_{uuid.uuid4().hex}"
    item: dict[str, Any] = {"id": item_id, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    yield event("response.output_item.added", output_index=0, item=item)
    where = {"item_id": item_id, "output_index": 0, "content_index": 0}
    yield event("response.content_part.added", **where, part=_part(""))
    words: list[str] = []
    reason: str | None = None
    async for piece in generate(engine, job):
        reason = piece.finish_reason
        if reason is None:
            words.append(piece.text)
            yield event("response.output_text.delta", **where, delta=piece.text, logprobs=[])
    text = "".join(words)
    yield event("response.output_text.done", **where, text=text, logprobs=[])
    yield event("response.content_part.done", **where, part=_part(text))
    status = "completed" if reason == "stop" else "incomplete"
    item = item | {"status": status, "content": [_part(text)]}
    yield event("response.output_item.done", output_index=0, item=item)
    usage = {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": len(words),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.prompt_tokens + len(words),
    }
    details = None if reason == "stop" else {"reason": "max_output_tokens"}
    response |= {"status": status, "output": [item], "usage": usage, "incomplete_details": details}
    yield event(f"response.{status}", response=response)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}
