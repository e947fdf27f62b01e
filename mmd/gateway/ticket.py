"""One request's place with the scheduler."""

import asyncio
from typing import TYPE_CHECKING

from mmd.config import Model
from mmd.gateway.relay.gate import Place
from mmd.names import UnitName

if TYPE_CHECKING:
    from mmd.gateway.dispatcher import Dispatcher

__all__ = ["Ticket"]


class Ticket(Place):
    """A place that the dispatcher gives."""

    __slots__ = ("_admission", "_dispatcher", "model", "request")

    def __init__(
        self,
        dispatcher: "Dispatcher",
        request: int,
        model: Model,
        *,
        unit: UnitName | None = None,
        admission: "asyncio.Future[UnitName] | None" = None,
    ) -> None:
        super().__init__(unit)
        self._dispatcher = dispatcher
        self._admission = admission
        self.request = request
        self.model = model

    @property
    def waiting(self) -> bool:
        return self._admission is not None and not self._admission.done()

    async def admitted(self, timeout_s: float | None = None) -> UnitName | None:
        if self._admission is None:
            return self.unit
        if not self._admission.done():
            await asyncio.wait((self._admission,), timeout=timeout_s)
        return self._admission.result() if self._admission.done() else None

    async def progress(self) -> str:
        return self._dispatcher.progress(self.request, self.model)

    def unreachable(self, wait_s: float | None) -> None:
        self._admission = self._dispatcher.readmit(self.request, wait_s)

    def close(self) -> None:
        self._dispatcher.give_back(self.request, self._admission)
