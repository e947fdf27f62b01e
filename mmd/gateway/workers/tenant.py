"""A worker's gate: requests go through by the leases that it holds, and are asked for one by one where it holds none."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import msgspec

from mmd.config import Config, Model
from mmd.gateway.api_error import ApiError
from mmd.gateway.relay.engine import EngineConnections
from mmd.gateway.relay.gate import Gate, Place
from mmd.gateway.relay.kept import KeptAnswers
from mmd.gateway.workers.messages import (
    Admitted,
    Ask,
    AskProgress,
    Drained,
    GiveBack,
    Kept,
    Lease,
    Lost,
    Progress,
    Refused,
    Revoke,
    Revoked,
)
from mmd.gateway.workers.tally import Tally
from mmd.names import UnitName

__all__ = ["Tenant"]


@dataclass(slots=True)
class _Lent:
    """A unit that requests may go to without asking."""

    unit: UnitName
    slot: int
    revoked: bool = False


class _Place(Place):
    """A request that went through by a lease, was asked for, or both, one after the other."""

    __slots__ = ("_answer", "_lent", "_model", "_number", "_tenant")

    def __init__(self, tenant: "Tenant", model: Model, lent: _Lent | None, wait_s: float | None) -> None:
        super().__init__(None if lent is None else lent.unit)
        self._tenant = tenant
        self._model = model
        self._lent = lent
        self._number = 0
        self._answer: asyncio.Future[UnitName] | None = None
        if lent is None:
            self._number, self._answer = tenant.ask(model, wait_s)

    @property
    def waiting(self) -> bool:
        return self._answer is not None and not self._answer.done()

    async def admitted(self, timeout_s: float | None = None) -> UnitName | None:
        if self._answer is None:
            return self.unit
        if not self._answer.done():
            await asyncio.wait((self._answer,), timeout=timeout_s)
        if not self._answer.done():
            return None
        self.unit = self._answer.result()
        return self.unit

    async def progress(self) -> str:
        return await self._tenant.progress(self._number)

    def unreachable(self, wait_s: float | None) -> None:
        assert self.unit is not None
        self._number, self._answer = self._tenant.report_lost(self._number, self._model, self.unit, wait_s)
        self._end_lease()

    def close(self) -> None:
        self._end_lease()
        if self._number:
            self._tenant.give_back(self._number)
            self._number = 0

    def _end_lease(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._tenant.end(lent)


class Tenant(Gate):
    """`send` takes messages to the process that decides."""

    def __init__(self, tally: Tally, send: Callable[[msgspec.Struct], None]) -> None:
        self._config = Config()
        self._tally = tally
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[UnitName]] = {}
        self._progress: dict[int, asyncio.Future[str]] = {}
        self._lent: dict[str, list[_Lent]] = {}
        """By model name."""
        self._endpoints: dict[UnitName, str | None] = {}
        self._connections: dict[str, EngineConnections] = {}
        self._kept = KeptAnswers()
        self._kept.told = self._tell_kept

    # The gate.

    @property
    def config(self) -> Config:
        return self._config

    def configure(self, config: Config) -> None:
        self._config = config

    def request(self, model: Model, wait_s: float | None) -> _Place:
        lent = self._lent.get(model.name)
        if lent is None:
            return _Place(self, model, None, wait_s)
        best = lent[0] if len(lent) == 1 else min(lent, key=lambda each: self._tally.in_flight(each.slot))
        self._tally.begin(best.slot, self._loop.time())
        return _Place(self, model, best, wait_s)

    def endpoint(self, unit: UnitName) -> str | None:
        return self._endpoints.get(unit)

    def connections(self, endpoint: str) -> EngineConnections:
        connections = self._connections.get(endpoint)
        if connections is None:
            connections = self._connections[endpoint] = EngineConnections(endpoint)
        return connections

    def kept(self) -> KeptAnswers:
        return self._kept

    def _tell_kept(self, answer: str, model: str) -> None:
        self._send(Kept(answer, model))

    # What places do.

    async def progress(self, number: int) -> str:
        answer: asyncio.Future[str] = self._loop.create_future()
        self._progress[number] = answer
        self._send(AskProgress(number))
        try:
            return await answer
        finally:
            del self._progress[number]

    def end(self, lent: _Lent) -> None:
        """A request that went through by a lease is over."""
        if not self._tally.end(lent.slot, self._loop.time()) and lent.revoked:
            self._send(Drained())

    def ask(self, model: Model, wait_s: float | None) -> tuple[int, "asyncio.Future[UnitName]"]:
        number = next(self._numbers)
        self._send(Ask(number, model.name, wait_s))
        return number, self._expect(number)

    def report_lost(
        self, number: int, model: Model, unit: UnitName, wait_s: float | None
    ) -> tuple[int, "asyncio.Future[UnitName]"]:
        """A request found nobody at a unit; `number` is 0 if it has not been asked for yet."""
        number = number or next(self._numbers)
        self._send(Lost(number, model.name, str(unit), wait_s))
        return number, self._expect(number)

    def _expect(self, number: int) -> "asyncio.Future[UnitName]":
        answer: asyncio.Future[UnitName] = self._loop.create_future()
        self._answers[number] = answer
        return answer

    def give_back(self, number: int) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None:
            answer.cancel()
        self._send(GiveBack(number))

    # What the deciding process says.

    def hear(self, message: Lease | Revoke | Admitted | Refused | Progress) -> None:
        match message:
            case Lease():
                self._take(_unit(message.unit), message.model, message.slot, message.endpoint)
            case Revoke():
                self._return(_unit(message.unit))
            case Admitted():
                unit = _unit(message.unit)
                self._endpoints[unit] = message.endpoint
                answer = self._answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_result(unit)
            case Refused():
                answer = self._answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_exception(message.error())
                    answer.exception()  # the client may have left: nobody need look at it
            case Progress():
                told = self._progress.get(message.number)
                if told is not None and not told.done():
                    told.set_result(message.words)

    def _take(self, unit: UnitName, model: str, slot: int, endpoint: str) -> None:
        self._endpoints[unit] = endpoint
        lent = self._lent.setdefault(model, [])
        if all(each.unit != unit for each in lent):
            lent.append(_Lent(unit, slot))

    def _return(self, unit: UnitName) -> None:
        for model, lent in list(self._lent.items()):
            for each in [each for each in lent if each.unit == unit]:
                each.revoked = True
                lent.remove(each)
            if not lent:
                del self._lent[model]
        self._send(Revoked(str(unit)))

    def abandon(self) -> None:
        """Nobody decides any more."""
        for told in self._progress.values():
            if not told.done():
                told.set_result("the gateway is gone")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ApiError(503, "the gateway is gone", code="gateway_gone", retry_after_s=1))
                answer.exception()

    def close(self) -> None:
        for connections in self._connections.values():
            connections.close()


def _unit(name: str) -> UnitName:
    unit = UnitName.parse(name)
    assert unit is not None, name
    return unit
