"""Requests that a worker holds no lease for, and asks for one by one."""

import logging

from mmd.gateway.api_error import ApiError, no_such_model
from mmd.gateway.dispatcher import Dispatcher
from mmd.gateway.ticket import Ticket
from mmd.gateway.workers.messages import Admitted, Ask, AskProgress, GiveBack, Lost, Progress, Refused
from mmd.gateway.workers.process import WorkerProcess
from mmd.names import UnitName

__all__ = ["Desk"]

_log = logging.getLogger(__name__)


class Desk:
    """Speaks to one worker for the dispatcher."""

    def __init__(self, dispatcher: Dispatcher, worker: WorkerProcess) -> None:
        self._dispatcher = dispatcher
        self._worker = worker
        self._places: dict[int, Ticket] = {}

    def hear(self, message: Ask | Lost | GiveBack | AskProgress) -> None:
        match message:
            case Ask():
                self._ask(message)
            case Lost(unit=unit):
                self._lost(message, UnitName.parse(unit))
            case GiveBack(number):
                place = self._places.pop(number, None)
                if place is not None:
                    place.close()
            case AskProgress(number):
                place = self._places.get(number)
                words = "turned away" if place is None else self._dispatcher.progress(place.request, place.model)
                self._worker.say(Progress(number, words))

    def _ask(self, message: Ask | Lost) -> None:
        config = self._dispatcher.config
        model = config.models.get(message.model)
        if model is None:
            self._worker.say(Refused.of(message.number, no_such_model(message.model, config)))
        else:
            self._follow(message.number, self._dispatcher.request(model, message.wait_s))

    def _lost(self, message: Lost, unit: UnitName | None) -> None:
        place, model = self._places.get(message.number), self._dispatcher.config.models.get(message.model)
        if place is not None:
            place.unreachable(message.wait_s)
            self._follow(message.number, place)
        elif model is None or unit is None:
            self._ask(message)
        else:
            self._follow(message.number, self._dispatcher.lost(unit, model, message.wait_s))

    def _follow(self, number: int, place: Ticket) -> None:
        self._places[number] = place
        self._dispatcher.spawn(self._tell_admission(number, place))

    async def _tell_admission(self, number: int, place: Ticket) -> None:
        try:
            unit = await place.admitted()
        except ApiError as error:
            self._worker.say(Refused.of(number, error))
        except Exception:  # whatever it is, the client is not left waiting
            _log.exception("a request for %s failed", place.model.name)
            message = "internal error; see journalctl -u mmd-gateway"
            self._worker.say(Refused.of(number, ApiError(500, message, code="internal_error")))
        else:
            assert unit is not None, "there was no limit to the wait"
            self._worker.say(Admitted(number, str(unit), self._dispatcher.endpoint(unit)))

    def close(self) -> None:
        """The worker has gone: so have those who waited."""
        for place in self._places.values():
            place.close()
        self._places.clear()
