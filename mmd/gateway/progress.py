"""What a request waits for, in words for the client: how its model comes along, for how long yet, and who is before it."""

from collections.abc import Mapping

from mmd.config import Model
from mmd.gateway.stage import model_state
from mmd.names import UnitName
from mmd.policy.admission import lacking
from mmd.policy.forecast import ready_in_s
from mmd.policy.state import State
from mmd.quantity import human_duration
from mmd.systemd.unit import UnitState

__all__ = ["progress"]


def progress(state: State, model: Model, request: int, units: Mapping[UnitName, UnitState], now: float) -> str:
    """Such as `qwen7b is starting: loading weights, 12 s; about 20 s left; 3rd in line`. One line; no other model is named."""
    words = [f"{model.name} is {model_state(state, model)}{_doing(state, model, units, now)}"]
    left_s = ready_in_s(state, model, now)
    if left_s and state.lesson_of(model.name).start_s is not None:
        words.append(f"about {human_duration(left_s)} left")
    queue = [waiter.request for waiter in state.queues.get(model.name, ())]
    if request in queue:
        words.append(f"{_ordinal(queue.index(request) + 1)} in line")
    return " ".join("; ".join(words).split())  # a status is text of an engine's: it must not end the comment


def _doing(state: State, model: Model, units: Mapping[UnitName, UnitState], now: float) -> str:
    instances = state.instances_of(model)
    for instance in instances:
        if instance.activating:
            seen = units.get(instance.unit)
            return f": {seen.status_text}" if seen and seen.status_text else ""
    if any(instance.usable for instance in instances):
        return f": it answers as many requests as it may, {sum(instance.load for instance in instances)}"
    if model.name in state.claims:
        return ": room is being made for it"
    failures = state.failures.get(model.name)
    if failures is not None and failures.retry_at > now:
        return f": {failures.reason}; the next try is in {human_duration(failures.retry_at - now)}"
    short = lacking(state, model)
    return f": {short}" if short else ": it waits for room"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
