"""Answers that engines keep (/v1/responses), and whose they are: clients ask for them by nothing but their id.

What is known of one is a text, `MODEL`, or `MODEL\\nOWNER` if it was made with an API key: so it is kept, handed over and sent
between processes as it was when there were no owners. Names of models have no line feed.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from mmd.gateway.relay.fields import decode_referring

__all__ = ["KEPT_MAX", "IdFinder", "KeptAnswers", "names_answers", "referred_to", "with_owner"]

# The oldest are forgotten first; so many are half a MiB.
KEPT_MAX: Final = 4096

# For how long an unknown answer's id may be on its way from a worker or an earlier gateway, which send it before the client
# gets to see it: it takes milliseconds.
_ON_ITS_WAY_S: Final = 0.5

# As OpenAI and vLLM make them, at the beginning of an answer to /v1/responses, or of its first event.
_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[^"\\/?]{1,120})"')
_WITHIN_BYTES: Final = 16 << 10

_MADE_AT: Final = b"/v1/responses"
# Programs may read a path more leniently than we do.
_REFERRED: Final = re.compile(rb"/v1/+responses/+(?!input_tokens(?:/|$))([^/]+)")
_OWNER: Final = "\n"


def with_owner(model: str, owner: str) -> str:
    """What is kept of an answer of `model` that the key with the id `owner` made; "" for none."""
    return f"{model}{_OWNER}{owner}" if owner else model


def names_answers(target: bytes) -> bool:
    """Whether a request for `target` may make answers or refer to some."""
    return b"responses" in target or b"%" in target


def referred_to(method: bytes, target: bytes, body: bytes) -> list[str]:
    """The ids of the answers that a request refers to, wherever an engine may look for them."""
    path = unquote_to_bytes(target.partition(b"?")[0])
    found = [each.decode("utf-8", "replace") for each in _REFERRED.findall(path)]
    if method == b"POST" and path.rstrip(b"/").endswith(_MADE_AT):
        before = _previous(body)
        found += [before] if isinstance(before, str) and before else []
    return found


def _previous(body: bytes) -> object:
    try:
        return decode_referring(body).previous_response_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document.get("previous_response_id") if isinstance(document, dict) else None


class IdFinder:
    """Looks for the id in an answer."""

    def __init__(self) -> None:
        self.over = False
        """It was found, or is not there."""
        self._seen = b""

    def feed(self, piece: bytes) -> str | None:
        """The id, when this piece completes it."""
        self._seen += piece
        found = _ID.search(self._seen)
        self.over = found is not None or len(self._seen) > _WITHIN_BYTES
        return None if found is None else found[1].decode("ascii", "replace")


def _always(_: str) -> bool:
    return True


def _nobody(_: str, __: str) -> None:
    pass


class KeptAnswers:
    """Models by the ids of their answers, `KEPT_MAX` of them."""

    def __init__(self, present: Callable[[str], bool] = _always) -> None:
        """`present`: whether an engine of this model runs, awake or asleep. What another one had kept is gone."""
        self._present = present
        self._models: dict[str, str] = {}
        self._expected: dict[str, asyncio.Future[None]] = {}
        self.told: Callable[[str, str], None] = _nobody
        """Hears of every answer that is added, and its model."""
        self.others = 0
        """Processes that may have seen an answer of which we have not heard yet."""

    def find(self, answer: str) -> str | None:
        """The name of its model."""
        known = self._models.get(answer)
        if known is None:
            return None
        model = known.partition(_OWNER)[0]
        return model if self._present(model) else None

    def owner(self, answer: str) -> str | None:
        """The id of the key that made it, "" if none did; None: there is no such answer."""
        known = self._models.get(answer)
        return None if known is None else known.partition(_OWNER)[2]

    def all(self) -> list[tuple[str, str]]:
        """The ids and their models, the oldest first."""
        return list(self._models.items())

    def inherit(self, answers: Iterable[tuple[str, str]]) -> None:
        """Those that are known already to whom it may concern."""
        for answer, model in answers:
            self._models.pop(answer, None)
            self._models[answer] = model
            expected = self._expected.pop(answer, None)
            if expected is not None and not expected.done():
                expected.set_result(None)
        while len(self._models) > KEPT_MAX:
            del self._models[next(iter(self._models))]

    def add(self, answer: str, model: str) -> None:
        self.inherit(((answer, model),))
        self.told(answer, model)

    async def turn_up(self, answer: str) -> None:
        """Wait for an answer that somebody else may be telling us of."""
        if self.others and answer not in self._models:
            expected = self._expected.setdefault(answer, asyncio.get_running_loop().create_future())
            try:
                await asyncio.wait((expected,), timeout=_ON_ITS_WAY_S)
            finally:
                if self._expected.get(answer) is expected:
                    del self._expected[answer]
