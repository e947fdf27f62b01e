"""Requests: who is let through, who waits, who is turned away, and with which words."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mmd.config import Model
from mmd.names import CPU, UnitName, is_slice
from mmd.policy.actions import Action, Admit, Refusal, Refuse
from mmd.policy.events import Arrived, Phase
from mmd.policy.forecast import retry_after_s
from mmd.policy.instance import Instance, Waiter
from mmd.policy.ledger import RAM, Amounts, Key, awake_amounts, minus, shortfall
from mmd.policy.state import State
from mmd.quantity import human_duration, human_size

__all__ = [
    "Misfit",
    "admit",
    "admit_at_once",
    "arrive",
    "drop",
    "expire",
    "finish",
    "finish_at_once",
    "lacking",
    "misfit_of",
    "refuse_all",
    "requeue",
    "target_in_flight",
]

# Requests per instance, where nothing says it: engines that batch gain little beyond.
_TARGET_IN_FLIGHT = 16

# Retry-After while the GPUs cannot be read: the driver is asked again every 4 to 30 seconds.
_RETRY_S = 10.0


def arrive(state: State, event: Arrived, now: float) -> list[Action]:
    """Queue a request, or refuse it at once when waiting cannot help."""
    model = state.config.models.get(event.model)
    if model is None:
        return [Refuse(event.request, Refusal.UNKNOWN_MODEL, f"the model {event.model!r} does not exist")]
    refusal = _hopeless(state, model, event, now)
    if refusal is None and event.wait_s == 0 and not _at_once(state, model):
        refusal = Refuse(event.request, Refusal.WAITED_TOO_LONG, *_too_long(state, model, 0.0, now))
    if refusal is not None:
        return [refusal]
    if not event.operator:
        state.traffic_of(model.name).count(now)
    _enqueue(state, Waiter(event.request, model.name, now, event.operator, event.wait_s))
    return []


def admit_at_once(state: State, request: int, name: str, now: float) -> UnitName | None:
    """Let a request through to an instance of its model without queueing; None when none takes it, or something is going on.

    One pass, whether anything is going on and `_least_loaded` in one: it runs for every request.
    """
    model = state.config.models.get(name)
    if model is None or state.queues or state.claims or state.preload:
        return None
    limit = model.concurrency or math.inf
    best: Instance | None = None
    up = busy = load = 0
    for instance in state.instances.values():
        if instance.release is not None or instance.stale_since is not None:
            return None
        if instance.unit.id == model.id and instance.usable:
            here = instance.load
            up, busy = up + 1, busy + here
            if here < limit and (best is None or (here, instance.unit) < (load, best.unit)):
                best, load = instance, here
    crowded = model.replicas.max > 1 and busy + 1 > up * target_in_flight(model)
    if best is None or crowded:
        return None
    state.traffic_of(name).count(now)
    _let_in(state, request, best, now)
    return best.unit


def finish_at_once(state: State, request: int, now: float) -> bool:
    """End an admitted request; False when something is going on that its end may bear upon."""
    if state.queues or state.claims or state.preload or state.crowded:
        return False
    for instance in state.instances.values():
        if instance.release is not None or instance.stale_since is not None:
            return False
    finish(state, request, now)
    return True


def target_in_flight(model: Model) -> int:
    """How many requests each of its instances should have at most, in flight or waiting, while there may be more instances."""
    return model.replicas.target_in_flight or model.concurrency or _TARGET_IN_FLIGHT


def finish(state: State, request: int, now: float) -> None:
    """Take an admitted request off its instance."""
    unit = state.admitted.pop(request, None)
    instance = state.instances.get(unit) if unit is not None else None
    if instance is not None:
        instance.in_flight.discard(request)
        instance.last_activity = now


def _let_in(state: State, request: int, instance: Instance, now: float) -> None:
    state.admitted[request] = instance.unit
    instance.in_flight.add(request)
    instance.last_activity = now


def _hopeless(state: State, model: Model, event: Arrived, now: float) -> Refuse | None:
    if any(i.phase is Phase.READY for i in state.instances_of(model)):
        return None if _at_once(state, model) else _no_room(state, model, event, now)
    misfit = misfit_of(state, model)
    if misfit is not None:
        return Refuse(event.request, misfit.why, misfit.words, misfit.retry_after_s)
    if event.operator:
        state.failures.pop(model.name, None)
        return None
    asleep = any(i.phase is Phase.SLEEPING for i in state.instances_of(model))
    if asleep and not model.wake_on_request:
        hint = f"it does not wake on request: mmdctl wake {model.name}"
        return Refuse(event.request, Refusal.ASLEEP, f"the model {model.name!r} is asleep; {hint}")
    return _failed_lately(state, model, event, now) or _no_room(state, model, event, now)


def _at_once(state: State, model: Model) -> bool:
    return model.name not in state.queues and _least_loaded(state, model) is not None


def _failed_lately(state: State, model: Model, event: Arrived, now: float) -> Refuse | None:
    failures = state.failures.get(model.name)
    if failures is None or not (failures.final or (now < failures.retry_at and not failures.crashed)):
        return None
    if failures.final:
        message = f"{model.name}: {failures.reason}; it has failed {failures.count} times: mmdctl reset {model.name}"
        return Refuse(event.request, Refusal.START_FAILED, message, None, failures.tail)
    wait_s = failures.retry_at - now
    message = f"{model.name}: {failures.reason}; the next try is in {human_duration(wait_s)}"
    return Refuse(event.request, Refusal.BACKING_OFF, message, wait_s, failures.tail)


def _no_room(state: State, model: Model, event: Arrived, now: float) -> Refuse | None:
    """The answer when as many wait already as may, for this model or for all."""
    if event.operator:
        return None
    limit = state.config.gateway.queue_limit
    if _crowded(state, model):
        why = Refusal.MODEL_BUSY
        words = f"{model.name} has all the requests that it may: {model.concurrency} at a time (concurrency)"
        words += f" and {model.queue_limit} that wait (queue_limit)" if model.queue_limit else ""
    elif len(state.waiting) >= limit:
        why, words = Refusal.QUEUE_FULL, f"{limit} requests are waiting already (gateway.queue_limit)"
    else:
        return None
    return Refuse(event.request, why, words, retry_after_s(state, model, now))


def _crowded(state: State, model: Model) -> bool:
    """Whether a model with a limit has as many requests, in flight and waiting, as it may. While none of its instances is up,
    those that one will take may wait besides."""
    if not model.concurrency or model.queue_limit is None:
        return False
    instances = state.instances_of(model)
    here = sum(instance.load for instance in instances) + len(state.queues.get(model.name, ()))
    return here >= model.concurrency * max(1, sum(instance.usable for instance in instances)) + model.queue_limit


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why there is no place for a model, now or ever."""

    why: Refusal
    words: str
    retry_after_s: float | None = None


def misfit_of(state: State, model: Model) -> Misfit | None:
    """None when the model fits somewhere on empty GPUs, else the arithmetic that says why not."""
    placements = state.placements(model)
    if not placements and state.gpus_awaited:
        return None
    if not placements and state.gpu_problem:
        words = f"{model.name} needs {_gpu_words(model)}, and the GPUs cannot be read: {state.gpu_problem}"
        return Misfit(Refusal.GPUS_UNREADABLE, words, _RETRY_S)
    if not placements:
        words = f"{model.name} needs {_gpu_words(model)}, and this machine has {_machine_words(state, model)}"
        return Misfit(Refusal.NEVER_FITS, words)
    needs = [awake_amounts(model, placement, state.vram_of(model)) for placement in placements]
    empty, pinned = state.empty(), state.pinned(model)
    best = min(needs, key=lambda need: sum(shortfall(need, minus(empty, pinned)).values()))
    missing = next(iter(shortfall(best, minus(empty, pinned))), None)
    if missing is None:
        return None
    return Misfit(Refusal.NEVER_FITS, f"{model.name} can never fit: {_arithmetic(state, missing, best, empty, pinned)}")


def _arithmetic(state: State, key: Key, need: Amounts, empty: Amounts, pinned: Amounts) -> str:
    """Why `need` is more than there is of one resource, in numbers that can be checked."""
    held = pinned.get(key, 0)
    if not isinstance(key, int):
        size = _size_words(key, need)
        beside = f", {size(held)} of it held by pinned models" if held else ""
        return f"it needs {size(need[key])} of {key}, and there is {size(empty.get(key, 0))}{beside}"
    total, reserve = state.gpus[key].total_bytes, state.config.gpus.reserve_bytes
    beside = f" - {human_size(held)} held by pinned models" if held else ""
    return (
        f"it needs {human_size(need[key])} on a GPU, and GPU {key}, the best choice, has {human_size(total)} - "
        f"{human_size(reserve)} reserve{beside} = {human_size(empty[key] - held)}"
    )


def _size_words(resource: str, need: Amounts) -> Callable[[float], str]:
    """How amounts of a named resource are written: as sizes where it is needed by size."""
    return human_size if resource == RAM or isinstance(need[resource], int) else "{:.10g}".format


def lacking(state: State, model: Model) -> str:
    """What of the named resources there is too little of for `model` to start, in words; "" when it does not wait for that."""
    if state.instances_of(model) or model.name in state.claims:
        return ""
    need, free = awake_amounts(model, CPU, 0), state.free_later()
    words = []
    for name in map(str, shortfall(need, free)):
        size = _size_words(name, need)
        words.append(f"it needs {size(need[name])} of {name}, of which {size(max(0, free.get(name, 0)))} is free")
    return "; ".join(words)


def _gpu_words(model: Model) -> str:
    if isinstance(model.gpus, int):
        return f"{model.gpus} GPU{'s' if model.gpus > 1 else ''}"
    return f"GPU {', '.join(map(str, model.gpus))}"


def _machine_words(state: State, model: Model) -> str:
    slices = sum(map(is_slice, state.gpus))
    whole = len(state.gpus) - slices
    if not slices:
        return str(whole or "none")
    limit = ", of which a process can use no more than one" if model.gpu_count > 1 else ""
    divided = f"{slices} slice{'s' if slices > 1 else ''} of divided GPUs (MIG){limit}"
    return f"{whole} and {divided}" if whole else divided


def admit(state: State, now: float) -> list[Action]:
    """Let waiting requests through to instances that are ready, oldest first, to the least loaded instance."""
    actions: list[Action] = []
    for name in list(state.queues):
        model = state.config.models[name]
        while name in state.queues:
            instance = _least_loaded(state, model)
            if instance is None:
                break
            waiter = state.queues[name][0]
            drop(state, waiter.request)
            _let_in(state, waiter.request, instance, now)
            actions.append(Admit(waiter.request, instance.unit))
    return actions


def _least_loaded(state: State, model: Model) -> Instance | None:
    room = [i for i in state.instances_of(model) if i.usable and (model.concurrency == 0 or i.load < model.concurrency)]
    return min(room, key=lambda i: (i.load, i.unit), default=None)


def expire(state: State, now: float) -> list[Action]:
    """Refuse those that have waited longer than `gateway.wait_limit`, or than they wanted to."""
    limit = state.config.gateway.wait_limit_s
    late = [w for w in state.waiting.values() if now - w.since > (limit if w.wait_s is None else min(limit, w.wait_s))]
    actions: list[Action] = []
    for waiter in late:
        message, retry_s = _too_long(state, state.config.models[waiter.model], waiter.wait_s, now)
        drop(state, waiter.request)
        actions.append(Refuse(waiter.request, Refusal.WAITED_TOO_LONG, message, retry_s))
    return actions


def _too_long(state: State, model: Model, wait_s: float | None, now: float) -> tuple[str, float]:
    """What somebody is told who has waited in vain, for `wait_s` at most, and when to come again."""
    limit = state.config.gateway.wait_limit_s
    if wait_s == 0:
        message = f"{model.name} is not ready now, and the request does not wait (X-MMD-Wait: 0)"
    elif wait_s is not None and wait_s < limit:
        message = f"{model.name} did not become ready within {human_duration(wait_s)} (X-MMD-Wait)"
    else:
        message = f"{model.name} did not become ready within {human_duration(limit)} (gateway.wait_limit)"
    if short := lacking(state, model):
        message += f": {short}"
    return message, retry_after_s(state, model, now)


def refuse_all(state: State, model: str, why: Refusal, message: str, *, retry_after_s: float | None,
               tail: tuple[str, ...] = ()) -> list[Action]:  # fmt: skip
    """Turn away everybody who waits for `model`."""
    requests = [waiter.request for waiter in state.queues.get(model, ())]
    for request in requests:
        drop(state, request)
    return [Refuse(request, why, message, retry_after_s, tail) for request in requests]


def drop(state: State, request: int) -> None:
    """Take a request out of its queue, if it still waits."""
    waiter = state.waiting.pop(request, None)
    if waiter is None:
        return
    queue = state.queues[waiter.model]
    queue.remove(waiter)
    if not queue:
        del state.queues[waiter.model]


def requeue(state: State, waiter: Waiter) -> None:
    """Put an admitted request that reached nobody back, at the head of its queue."""
    state.waiting[waiter.request] = waiter
    state.queues.setdefault(waiter.model, deque()).appendleft(waiter)


def _enqueue(state: State, waiter: Waiter) -> None:
    state.waiting[waiter.request] = waiter
    state.queues.setdefault(waiter.model, deque()).append(waiter)
