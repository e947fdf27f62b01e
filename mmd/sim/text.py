"""What a simulated model says: deterministic, a token is a word."""

import hashlib
import math
import re
import struct
from collections.abc import Iterator

__all__ = ["CONTEXT_TOKENS", "GARBAGE", "answer", "count_tokens", "embedding", "fraction", "pieces", "similarity"]

CONTEXT_TOKENS = 131_072
"""The most that it says, and claims to read."""

GARBAGE = "!"
"""The only token of a model whose weights were discarded: what a real engine says after a level 2 sleep without a reload."""

_WORDS = ("and", "so", "it", "goes", "on", "with", "words", "that", "mean", "nothing", "but", "arrive", "in", "time")


def answer(model: str, prompt: str) -> tuple[list[str], Iterator[str]]:
    """The natural answer as tokens (each with its leading space), and the words that follow when more are demanded."""
    said = prompt if len(prompt) <= 200 else f"{prompt[:200]}..."
    natural = f"I am {model}, a simulated model. You said: {said or 'nothing'}".split()
    return [natural[0], *(f" {word}" for word in natural[1:])], _filler(prompt)


def _filler(prompt: str) -> Iterator[str]:
    index = hashlib.sha256(prompt.encode(errors="replace")).digest()[0]
    while True:
        yield f" {_WORDS[index % len(_WORDS)]}"
        index += 1


def count_tokens(text: str) -> int:
    return max(1, len(text.split()))


def pieces(text: str) -> list[str]:
    """The tokens of `text`, as many as `count_tokens` says; together they are `text` again."""
    return re.findall(r"\s*\S+(?:\s+\Z)?", text) or [text]


def embedding(text: str, dimensions: int) -> list[float]:
    """A unit vector that depends on nothing but `text`."""
    raw = hashlib.shake_256(text.encode(errors="replace")).digest(4 * dimensions)
    values = [value / 2**31 - 1 for value in struct.unpack(f"<{dimensions}I", raw)]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / norm for value in values]


def fraction(text: str) -> float:
    """A number from 0 to 1 that depends on nothing but `text`."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:4]) / 2**32


def similarity(query: str, document: str) -> float:
    """How relevant `document` is, from 0 to 1: by the words that both have; what is left decides between equals."""
    asked, found = set(query.lower().split()), set(document.lower().split())
    shared = len(asked & found) / len(asked | found) if asked | found else 1.0
    return 0.99 * shared + 0.01 * fraction(f"{query}\n{document}")
