"""What a simulated model says: deterministic, a token is a word."""

import hashlib
import math
import struct
from collections.abc import Iterator

__all__ = ["GARBAGE", "answer", "count_tokens", "embedding"]

GARBAGE = "!"
"""The only token of a model whose weights were discarded: what a real engine says after a level 2 sleep without a reload."""

_WORDS = ("and", "so", "it", "goes", "on", "with", "words", "that", "mean", "nothing", "but", "arrive", "in", "time")


def answer(model: str, prompt: str) -> tuple[list[str], Iterator[str]]:
    """The natural answer as tokens (each with its leading space), and the words that follow when more are demanded."""
    said = prompt if len(prompt) <= 200 else f"{prompt[:200]}..."
    natural = f"I am {model}, a simulated model. You said: {said or 'nothing'}".split()
    return [natural[0], *(f" {word}" for word in natural[1:])], _filler(prompt)


def _filler(prompt: str) -> Iterator[str]:
    index = hashlib.sha256(prompt.encode()).digest()[0]
    while True:
        yield f" {_WORDS[index % len(_WORDS)]}"
        index += 1


def count_tokens(text: str) -> int:
    return max(1, len(text.split()))


def embedding(text: str, dimensions: int) -> list[float]:
    """A unit vector that depends on nothing but `text`."""
    raw = hashlib.shake_256(text.encode()).digest(4 * dimensions)
    values = [value / 2**31 - 1 for value in struct.unpack(f"<{dimensions}I", raw)]
    norm = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / norm for value in values]
