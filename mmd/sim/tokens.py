"""Tokens as numbers: vLLM's and llama.cpp's tokenize and detokenize."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from mmd.sim.call import State, inference, state_of
from mmd.sim.errors import BadRequestError
from mmd.sim.fields import content_text
from mmd.sim.text import CONTEXT_TOKENS, pieces

__all__ = ["Vocabulary", "detokenize", "tokenize"]

_MOST_WORDS = 100_000


class Vocabulary(State):
    """A word has the same number in every engine; the engine that numbered it remembers the word."""

    def __init__(self) -> None:
        self._words: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """One number below 2^31 for each token of `text`, as usage counts them."""
        numbers = []
        for piece in pieces(text):
            number = int.from_bytes(hashlib.sha256(piece.encode(errors="replace")).digest()[:4]) >> 1
            self._words[number] = piece
            numbers.append(number)
        while len(self._words) > _MOST_WORDS:
            del self._words[next(iter(self._words))]
        return numbers

    def decode(self, numbers: Sequence[int]) -> str:
        """The text; a number that means nothing here becomes U+FFFD, what a decoder writes for bytes that are no text."""
        return "".join(self._words.get(number, "\ufffd") for number in numbers)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """POST /tokenize."""
    async with inference(request) as call:
        words = state_of(request, Vocabulary)
        if "content" in call.body:
            return web.json_response({"tokens": _for_llama_cpp(words, call.body)})
        text = _text(call.body)
        tokens = words.encode(text)
        strings = list(pieces(text)) if call.body.get("return_token_strs") else None
        answer = {"count": len(tokens), "max_model_len": CONTEXT_TOKENS, "tokens": tokens, "token_strs": strings}
        return web.json_response(answer)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """POST /detokenize."""
    async with inference(request) as call:
        tokens = call.body.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise BadRequestError("tokens: a list of integers is required", param="tokens")
        text = state_of(request, Vocabulary).decode(tokens)
        # Both ask in the same words: vLLM answers with `prompt`, llama.cpp with `content`.
        return web.json_response({"prompt": text, "content": text})


def _for_llama_cpp(words: Vocabulary, body: Mapping[str, Any]) -> list[int] | list[dict[str, object]]:
    text = content_text(body["content"])
    tokens = words.encode(text)
    if not body.get("with_pieces"):
        return tokens
    return [{"id": token, "piece": piece} for token, piece in zip(tokens, pieces(text), strict=True)]


def _text(body: Mapping[str, Any]) -> str:
    if isinstance(messages := body.get("messages"), list) and all(isinstance(message, dict) for message in messages):
        return "\n".join(content_text(message.get("content")) for message in messages)
    if isinstance(prompt := body.get("prompt"), str):
        return prompt
    raise BadRequestError("prompt: a string, or messages, is required", param="prompt")
