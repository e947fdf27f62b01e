"""Requests that workers relay, for those who look at them and cancel them: asked for, and awaited for a moment."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import msgspec

from mmd.gateway.channel import from_memory
from mmd.gateway.workers.messages import CancelRequest, Found, ListRequests
from mmd.gateway.workers.process import WorkerProcess
from mmd.status import RequestStatus

__all__ = ["Census"]

# A worker answers within a turn of its loop; one that does not within this time is left out.
_WITHIN_S: Final = 2.0


@dataclass(slots=True)
class _Question:
    """What was asked, whose answers lack, and what the others have found."""

    awaited: set[WorkerProcess]
    answered: asyncio.Event
    found: list[RequestStatus] = field(default_factory=list)


class Census:
    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        """`workers`: those that there are, at any time."""
        self._workers = workers
        self._numbers = count(1)
        self._questions: dict[int, _Question] = {}
        self._decoder = msgspec.json.Decoder(list[RequestStatus])

    async def requests(self) -> list[RequestStatus]:
        number = next(self._numbers)
        return await self._ask(number, ListRequests(number))

    async def cancel(self, request: str) -> list[RequestStatus]:
        """The one that was cancelled, if one of them had it."""
        number = next(self._numbers)
        return await self._ask(number, CancelRequest(number, request))

    async def _ask(self, number: int, message: ListRequests | CancelRequest) -> list[RequestStatus]:
        question = self._questions[number] = _Question(set(self._workers), asyncio.Event())
        try:
            for worker in question.awaited:
                worker.say(message)
            if question.awaited:
                async with asyncio.timeout(_WITHIN_S):
                    await question.answered.wait()
        except TimeoutError:
            pass
        finally:
            del self._questions[number]
        return question.found

    def hear(self, worker: WorkerProcess, answer: Found, fds: list[int]) -> None:
        found = self._decoder.decode(from_memory(fds[0]))
        question = self._questions.get(answer.number)
        if question is not None:
            question.found += found
            self._answered(question, worker)

    def forget(self, worker: WorkerProcess) -> None:
        """It has gone, and what it relayed as well."""
        for question in self._questions.values():
            self._answered(question, worker)

    def _answered(self, question: _Question, worker: WorkerProcess) -> None:
        question.awaited.discard(worker)
        if not question.awaited:
            question.answered.set()
