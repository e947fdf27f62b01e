"""What models answer with numbers: embeddings, scores, ranks, classes. A text takes the time of one token."""

import base64
import struct
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from mmd.sim.call import Call, inference
from mmd.sim.errors import BadRequestError
from mmd.sim.fields import content_text, one_of, texts, whole
from mmd.sim.generate import Pace
from mmd.sim.text import count_tokens, embedding, fraction, similarity

__all__ = ["classify", "embeddings", "pooling", "rerank", "score"]

_DIMENSIONS = 64
_MOST_DIMENSIONS = 1 << 16


async def embeddings(request: web.Request) -> web.StreamResponse:
    """POST /v1/embeddings."""
    async with inference(request) as call:
        return web.json_response(await _vectors(call, texts(call.body.get("input"), "input"), "embedding"))


async def pooling(request: web.Request) -> web.StreamResponse:
    """POST /pooling: vectors of texts or of a conversation."""
    async with inference(request) as call:
        messages = call.body.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            given = [" ".join(content_text(message.get("content")) for message in messages)]
        else:
            given = texts(call.body.get("input"), "input")
        return web.json_response(await _vectors(call, given, "data"))


async def classify(request: web.Request) -> web.StreamResponse:
    """POST /classify: two classes."""
    async with inference(request) as call:
        given = texts(call.body.get("input"), "input")
        await _take_time(call, len(given))
        shares = [fraction(text) for text in given]
        data = [
            {"index": index, "label": f"LABEL_{int(share < 0.5)}", "probs": [share, 1 - share], "num_classes": 2}
            for index, share in enumerate(shares)
        ]
        return web.json_response(_list("classify", call, data, sum(map(count_tokens, given))))


async def score(request: web.Request) -> web.StreamResponse:
    """POST /score: pairs of texts."""
    async with inference(request) as call:
        first = texts(one_of(call.body, "text_1", "queries", "data_1"), "text_1")
        second = texts(one_of(call.body, "text_2", "documents", "items", "data_2"), "text_2")
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise BadRequestError("text_1: one text, or as many as there are in text_2, is required", param="text_1")
        pairs = list(zip(first, second, strict=True))
        await _take_time(call, len(pairs))
        data = [{"index": index, "object": "score", "score": similarity(*pair)} for index, pair in enumerate(pairs)]
        return web.json_response(_list("score", call, data, sum(count_tokens(text) for pair in pairs for text in pair)))


async def rerank(request: web.Request) -> web.StreamResponse:
    """POST /rerank, by all its names."""
    async with inference(request) as call:
        query, given = call.body.get("query"), call.body.get("documents")
        if not isinstance(query, str):
            raise BadRequestError("query: a string is required", param="query")
        if not isinstance(given, list) or not given:
            raise BadRequestError("documents: a list of at least one is required", param="documents")
        most = whole(call.body, "top_n", default=0, lowest=0, highest=1 << 31) or len(given)  # 0 means all, as in vLLM
        documents = [_document(one) for one in given]
        await _take_time(call, len(documents))
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": similarity(query, text)}
            | ({"document": {"text": text}} if call.body.get("return_documents", True) else {})
            for index, text in enumerate(documents)
        ]
        results.sort(key=_relevance, reverse=True)
        tokens = sum(count_tokens(query) + count_tokens(text) for text in documents)
        answer = {"id": _name("rerank"), "object": "list", "model": call.model, "results": results[:most]}
        return web.json_response(answer | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}})


async def _vectors(call: Call, given: Sequence[str], field: str) -> dict[str, Any]:
    """The vector of each text in the field of this name, and the kind of an embedding or of a pooling."""
    dimensions = whole(call.body, "dimensions", default=_DIMENSIONS, highest=_MOST_DIMENSIONS)
    await _take_time(call, len(given))
    encode: Callable[[list[float]], object] = _base64 if call.body.get("encoding_format") == "base64" else list
    kind = "embedding" if field == "embedding" else "pooling"
    data = [{"index": i, "object": kind, field: encode(embedding(text, dimensions))} for i, text in enumerate(given)]
    return _list("embd" if kind == "embedding" else "pool", call, data, sum(map(count_tokens, given)))


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _take_time(call: Call, count: int) -> None:
    pace = Pace(call.engine)
    for _ in range(count):
        await pace.tick()


def _document(given: object) -> str:
    """A string, or an object with a `text` (Jina, Cohere) or `content` (vLLM's, with pictures)."""
    if isinstance(given, dict):
        return content_text(given.get("text", given.get("content")))
    return content_text(given)


def _relevance(result: Mapping[str, Any]) -> float:
    return float(result["relevance_score"])


def _list(prefix: str, call: Call, data: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    base = {"id": _name(prefix), "object": "list", "created": int(time.time()), "model": call.model}
    return base | {"data": data, "usage": usage}


def _name(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
