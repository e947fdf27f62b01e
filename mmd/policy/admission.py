"""Requests: who is let through, who waits, who is turned away, and with which words."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mmd.config import Model
from mmd.names import CPU, is_slice
from mmd.policy.actions import Action, Admit, Refusal, Refuse
from mmd.policy.events import Arrived, Phase
from mmd.policy.instance import Instance, Waiter
from mmd.policy.ledger import RAM, Amounts, Key, awake_amounts, minus, shortfall
from mmd.policy.state import State
from mmd.quantity import human_duration, human_size

__all__ = ["Misfit", "admit", "arrive", "drop", "expire", "lacking", "misfit_of", "refuse_all", "requeue"]

# Retry-After when the queue is full or the wait was too long: about one swap.
_RETRY_S = 10.0


def arrive(state: State, event: Arrived, now: float) -> list[Action]:
    """Queue a request, or refuse it at once when waiting cannot help."""
    model = state.config.models.get(event.model)
    if model is None:
        return [Refuse(event.request, Refusal.UNKNOWN_MODEL, f"the model {event.model!r} does not exist")]
    refusal = _hopeless(state, model, event, now)
    if refusal is not None:
        return [refusal]
    if not event.operator:
        state.traffic_of(model.name).count(now)
    _enqueue(state, Waiter(event.request, model.name, now, event.operator))
    return []


def _hopeless(state: State, model: Model, event: Arrived, now: float) -> Refuse | None:
    if any(i.phase is Phase.READY for i in state.instances_of(model)):
        at_once = model.name not in state.queues and _least_loaded(state, model) is not None
        return None if at_once else _queue_full(state, event)
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
    return _failed_lately(state, model, event, now) or _queue_full(state, event)


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


def _queue_full(state: State, event: Arrived) -> Refuse | None:
    limit = state.config.gateway.queue_limit
    if len(state.waiting) < limit or event.operator:
        return None
    return Refuse(event.request, Refusal.QUEUE_FULL, f"{limit} requests are waiting already", _RETRY_S)


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
            state.admitted[waiter.request] = instance.unit
            instance.in_flight.add(waiter.request)
            instance.last_activity = now
            actions.append(Admit(waiter.request, instance.unit))
    return actions


def _least_loaded(state: State, model: Model) -> Instance | None:
    room = [
        i for i in state.instances_of(model) if i.usable and (model.concurrency == 0 or len(i.in_flight) < model.concurrency)
    ]
    return min(room, key=lambda i: (len(i.in_flight), i.unit), default=None)


def expire(state: State, now: float) -> list[Action]:
    """Refuse those that have waited longer than `gateway.wait_limit`."""
    limit = state.config.gateway.wait_limit_s
    late = [w for w in state.waiting.values() if now - w.since >= limit]
    actions: list[Action] = []
    for waiter in late:
        drop(state, waiter.request)
        message = f"{waiter.model} did not become ready within {human_duration(limit)} (gateway.wait_limit)"
        if short := lacking(state, state.config.models[waiter.model]):
            message += f": {short}"
        actions.append(Refuse(waiter.request, Refusal.WAITED_TOO_LONG, message, _RETRY_S))
    return actions


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


def requeue(state: State, request: int, model: str, now: float) -> None:
    """Put an admitted request that reached nobody back, at the head of its queue."""
    waiter = Waiter(request, model, now, operator=False)
    state.waiting[request] = waiter
    state.queues.setdefault(model, deque()).appendleft(waiter)


def _enqueue(state: State, waiter: Waiter) -> None:
    state.waiting[waiter.request] = waiter
    state.queues.setdefault(waiter.model, deque()).append(waiter)
