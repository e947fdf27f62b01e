"""Requests that a worker holds no lease for, and asks for one by one."""

from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.ticket import Ticket
from mmd.gateway.workers.messages import Admitted, Ask, AskStage, GiveBack, Lost, Refused, Stage
from mmd.gateway.workers.process import WorkerProcess
from mmd.names import UnitName

__all__ = ["Desk"]


class Desk:
    """Speaks to one worker for the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, worker: WorkerProcess) -> None:
        self._dispatcher = dispatcher
        self._worker = worker
        self._places: dict[int, Ticket] = {}

    def hear(self, message: Ask | Lost | GiveBack | AskStage) -> None:
        match message:
            case Ask(number, name):
                self._ask(number, name)
            case Lost(number, name, unit):
                self._lost(number, name, UnitName.parse(unit))
            case GiveBack(number):
                place = self._places.pop(number, None)
                if place is not None:
                    place.close()
            case AskStage(number, name):
                self._dispatcher.spawn(self._tell_stage(number, name))

    def _ask(self, number: int, name: str) -> None:
        config = self._dispatcher.config
        model = config.models.get(name)
        if model is None:
            self._worker.say(Refused.of(number, no_such_model(name, config)))
        else:
            self._follow(number, self._dispatcher.request(model))

    def _lost(self, number: int, name: str, unit: UnitName | None) -> None:
        place, model = self._places.get(number), self._dispatcher.config.models.get(name)
        if place is not None:
            place.unreachable()
            self._follow(number, place)
        elif model is None or unit is None:
            self._ask(number, name)
        else:
            self._follow(number, self._dispatcher.lost(unit, model))

    def _follow(self, number: int, place: Ticket) -> None:
        self._places[number] = place
        self._dispatcher.spawn(self._tell_admission(number, place))

    async def _tell_admission(self, number: int, place: Ticket) -> None:
        try:
            unit = await place.admitted()
        except ApiError as error:
            self._worker.say(Refused.of(number, error))
        else:
            assert unit is not None, "there was no limit to the wait"
            self._worker.say(Admitted(number, str(unit), self._dispatcher.endpoint(unit)))

    async def _tell_stage(self, number: int, name: str) -> None:
        model = self._dispatcher.config.models.get(name)
        self._worker.say(Stage(number, "gone" if model is None else await self._dispatcher.stage(model)))

    def close(self) -> None:
        """The worker has gone: so have those who waited."""
        for place in self._places.values():
            place.close()
        self._places.clear()
