"""The leases that workers hold: what the scheduler lends and recalls (mmd.policy.leases) is told to every worker, and what
their tallies say is told to the scheduler."""

import asyncio
from collections.abc import Sequence

from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.workers.messages import Lease, Revoke
from mmd.gateway.workers.process import WorkerProcess
from mmd.gateway.workers.tally import UNITS_MAX
from mmd.names import UnitName
from mmd.policy.events import Returned, Surveyed, Tally

__all__ = ["Lessor"]


class Lessor:
    """See mmd.gateway.dispatcher.Lender."""

    def __init__(self, dispatcher: Dispatcher, workers: Sequence[WorkerProcess]) -> None:
        """`workers`: those that there are, at any time."""
        self._dispatcher = dispatcher
        self._workers = workers
        self._loop = asyncio.get_running_loop()
        self._slots: dict[UnitName, int] = {}
        """Of the tallies; a unit keeps its own for good, so that what is still in flight there is never another's."""
        self._leases: dict[UnitName, Lease | None] = {}
        """None: its engine has not said yet where it listens."""
        self._revoking: dict[UnitName, set[WorkerProcess]] = {}
        """Leases that were recalled, and who has not yet said that it knows."""
        self._surveyed: dict[UnitName, Tally] = {}

    def lend(self, unit: UnitName) -> None:
        slot = self._slots.setdefault(unit, len(self._slots))
        model = self._dispatcher.scheduler.state.model_of(unit)
        endpoint = self._dispatcher.endpoint(unit)
        self._leases[unit] = None
        if slot >= UNITS_MAX or model is None or endpoint is None:
            return  # they go on asking
        lease = self._leases[unit] = Lease(str(unit), model.name, slot, endpoint)
        for worker in self._workers:
            worker.say(lease)

    def renew(self, unit: UnitName) -> None:
        if unit in self._leases:
            lease = self._leases[unit]
            if self._dispatcher.endpoint(unit) not in (None, lease and lease.endpoint):
                self.lend(unit)

    def recall(self, unit: UnitName) -> None:
        self._leases.pop(unit, None)
        self._revoking[unit] = set(self._workers)
        if not self._workers:
            self._loop.call_soon(self._returned, unit)
        for worker in self._workers:
            worker.say(Revoke(str(unit)))

    def inform(self, worker: WorkerProcess) -> None:
        """Tell a fresh worker what is lent."""
        for lease in self._leases.values():
            if lease is not None:
                worker.say(lease)

    def revoked(self, worker: WorkerProcess, unit: UnitName) -> None:
        """The worker knows that it may not any more."""
        holders = self._revoking.get(unit)
        if holders is not None:
            holders.discard(worker)
            self._returned(unit)

    def forget(self, worker: WorkerProcess) -> None:
        """It is dead: it holds nothing, and nothing that it had is in flight."""
        for unit in tuple(self._revoking):
            self.revoked(worker, unit)
        self.survey()

    def _returned(self, unit: UnitName) -> None:
        if self._revoking.get(unit) == set():
            del self._revoking[unit]
            self.survey()
            self._dispatcher.post(Returned(unit))

    def survey(self) -> None:
        """Tell the scheduler what the tallies say, if they say something new."""
        found = {unit: self._tally(slot) for unit, slot in self._slots.items() if slot < UNITS_MAX}
        if found != self._surveyed:
            self._surveyed = found
            self._dispatcher.post(Surveyed(found))

    def _tally(self, slot: int) -> Tally:
        """All workers' together."""
        return Tally(
            sum(worker.tally.in_flight(slot) for worker in self._workers),
            sum(worker.arrivals(slot) for worker in self._workers),
            max((worker.tally.last_activity(slot) for worker in self._workers), default=0.0),
        )
