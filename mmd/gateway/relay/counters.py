"""What went through, per model: numbers in memory, no I/O for any request. Whoever wants them elsewhere reads them here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["USAGE_TAIL_BYTES", "Counters", "tokens_so_far"]

# `usage` ends a JSON answer, or is in the last event but one of a stream. What may follow it is short.
USAGE_TAIL_BYTES: Final = 2048

# Chat and completions say prompt and completion, /v1/responses input and output, embeddings prompt alone.
_PROMPT: Final = (b'"prompt_tokens"', b'"input_tokens"')
_COMPLETION: Final = (b'"completion_tokens"', b'"output_tokens"')
# A colon, a little white space, and as many digits as 64 bits hold.
_NUMBER_MAX_BYTES: Final = 20
_BETWEEN: Final = b": \t\r\n"


@dataclass(slots=True)
class Counters:
    """Of one model since the gateway started."""

    requests: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    """By HTTP status; 499: the client left."""
    received_bytes: int = 0
    """Bodies of requests."""
    sent_bytes: int = 0
    """Content of answers."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, status: int, received_bytes: int, sent_bytes: int, tail: bytes) -> None:
        """A request is over; `tail` is the end of its answer, which may say how many tokens it took.

        Text inside of JSON strings has its quotes escaped, so that what a model says is not mistaken for usage.
        """
        self.requests += 1
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.received_bytes += received_bytes
        self.sent_bytes += sent_bytes
        at = tail.rfind(b'"usage"')
        if at < 0:
            return
        self.prompt_tokens += _tokens(tail, at, _PROMPT)
        self.completion_tokens += _tokens(tail, at, _COMPLETION)

    def add(self, more: "Counters") -> None:
        self.requests += more.requests
        for status, number in more.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + number
        self.received_bytes += more.received_bytes
        self.sent_bytes += more.sent_bytes
        self.prompt_tokens += more.prompt_tokens
        self.completion_tokens += more.completion_tokens


def tokens_so_far(tail: bytes) -> int | None:
    """Of an answer under way, by the last usage in what came last; None: the engine has not told."""
    at = tail.rfind(b'"usage"')
    return _tokens(tail, at, _COMPLETION) if at >= 0 else None


def _tokens(tail: bytes, start: int, names: Sequence[bytes]) -> int:
    for name in names:
        at = tail.find(name, start)
        if at >= 0:
            return _number(tail, at + len(name))
    return 0


def _number(text: bytes, start: int) -> int:
    """The value of the field whose name ends at `start`; 0 if it is no number. A regular expression takes ten times as long."""
    number = 0
    for byte in text[start : start + _NUMBER_MAX_BYTES]:
        if 0x30 <= byte <= 0x39:
            number = 10 * number + byte - 0x30
        elif number or byte not in _BETWEEN:
            break
    return number
