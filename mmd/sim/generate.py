"""Generation: the tokens of jobs at the configured rate."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import NamedTuple

from mmd.sim.engine import Engine
from mmd.sim.errors import RefusedError
from mmd.sim.jobs import Job
from mmd.sim.text import GARBAGE, answer

__all__ = ["AbortedError", "Completion", "Pace", "Result", "collect", "generate"]


class AbortedError(RefusedError):
    """A sleep cut off what was in flight."""

    def __init__(self) -> None:
        super().__init__("aborted: the engine was put to sleep")


class Completion(NamedTuple):
    """What one token adds to an answer."""

    text: str = ""
    """Nothing, while it may be the beginning of a stop sequence."""
    tokens: int = 1
    finish_reason: str | None = None
    """Of the last one: stop, length or abort."""
    stopped_by: str | None = None
    """The stop sequence that ended it."""


class Result(NamedTuple):
    """A whole answer."""

    text: str
    tokens: int
    finish_reason: str | None
    stopped_by: str | None


class Pace:
    """When the tokens of one request are due; a step of another kind, such as one of drawing a picture, takes as long."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._aborts = engine.aborts
        self._ticks = 0

    async def tick(self) -> None:
        """Wait for the next token's time, and while a sleep holds requests; AbortedError when one cut them off."""
        self._ticks += 1
        rate = self._engine.options.tokens_per_second
        if rate:
            await asyncio.sleep(max(0.0, self._started + self._ticks / rate - self._loop.time()))
        await self._engine.running()
        if self._engine.aborts != self._aborts:
            raise AbortedError


async def generate(engine: Engine, jobs: Sequence[Job]) -> AsyncIterator[tuple[Job, Completion]]:
    """The tokens of all `jobs`, side by side as in a batch; the last one of each has its finish reason."""
    pace = Pace(engine)
    active = [(job, _say(job, garbage=not engine.weights_valid)) for job in jobs]
    while active:
        try:
            await pace.tick()
        except AbortedError:
            for job, _ in active:
                yield job, Completion(tokens=0, finish_reason="abort")
            return
        going = []
        for job, voice in active:
            completion = next(voice)
            yield job, completion
            if completion.finish_reason is None:
                going.append((job, voice))
        active = going


async def collect(engine: Engine, jobs: Sequence[Job]) -> list[Result]:
    """The whole answers, in the order of `jobs`."""
    said: dict[int, list[Completion]] = {job.choice: [] for job in jobs}
    async for job, completion in generate(engine, jobs):
        said[job.choice].append(completion)
    return [
        Result(
            "".join(one.text for one in all_of),
            sum(one.tokens for one in all_of),
            all_of[-1].finish_reason,
            all_of[-1].stopped_by,
        )
        for all_of in said.values()
    ]


def _say(job: Job, *, garbage: bool) -> Iterator[Completion]:
    """One for each token, until the answer, the limit or a stop sequence ends it."""
    natural, filler = answer(job.model, job.prompt)
    length = max(len(natural), job.min_tokens)
    wanted = length if job.max_tokens is None else min(length, job.max_tokens)
    reason = "stop" if wanted >= len(natural) and not job.min_tokens else "length"
    if not wanted:
        yield Completion(tokens=0, finish_reason=reason)
    held = ""
    words = repeat(GARBAGE) if garbage else chain(natural, filler)
    for number, word in enumerate(islice(words, wanted), start=1):
        held += word
        if found := _first_stop(held, job.stop):
            yield Completion(held[: held.index(found)], finish_reason="stop", stopped_by=found)
            return
        if number == wanted:
            yield Completion(held, finish_reason=reason)
            return
        ready = len(held) - _beginning(held, job.stop)
        yield Completion(held[:ready])
        held = held[ready:]


def _first_stop(text: str, stops: Sequence[str]) -> str | None:
    return min((stop for stop in stops if stop in text), key=text.index, default=None)


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop sequence."""
    lengths = (size for stop in stops for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size]))
    return max(lengths, default=0)
