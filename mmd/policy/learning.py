"""What measurements teach: how long models take to come, what they hold, what others leave."""

from dataclasses import replace

from mmd.config import Config, Model
from mmd.policy.actions import Sleep, Start, Wake
from mmd.policy.events import Done, GpuSample, Measured, Phase, Release
from mmd.policy.instance import Instance
from mmd.policy.ledger import RAM, plus
from mmd.policy.lesson import Lesson
from mmd.policy.state import State

__all__ = ["learn_gauge", "learn_outcome", "learn_sample", "learn_size", "learn_start", "raise_size", "same_gauge"]

# How much more is reckoned with, at least, after a start ran out of memory: about what estimates are off by.
_RAISE = 1.15

# By how much the memory that a sleep leaves may vary: allocators keep some hundred MiB more or less.
_LEAK_BYTES = 1 << 29
_LEAK_SHARE = 0.05


def learn_outcome(state: State, instance: Instance, event: Done) -> None:
    """How long an action that ended well took, and what a sleep left."""
    if instance.model is None:
        return
    name = instance.model.name
    lesson = state.lesson_of(name)
    match event.action:
        case Start():
            state.retried.discard(name)
            lesson = replace(lesson, start_s=event.elapsed_s)
        case Wake(level=level):
            took_s = event.elapsed_s
            lesson = replace(lesson, wake_s=took_s) if level == 1 else replace(lesson, reload_s=took_s)
        case Sleep(level=level):
            instance.held_bytes = event.held_bytes
            if event.held_bytes is not None:
                lesson = replace(lesson, held_bytes={**lesson.held_bytes, level: event.held_bytes})
                _watch_residual(state, instance, level, event.held_bytes)
    _learn(state, instance, lesson)


def _learn(state: State, instance: Instance, lesson: Lesson) -> None:
    """What an instance teaches of its model's definition: nothing, if an earlier one started it or the model has gone."""
    if instance.model is not None and instance.stale_since is None:
        state.lessons[instance.model.name] = lesson


def learn_start(state: State, instance: Instance, start_s: float | None) -> None:
    """How long the start of an instance took that somebody else started, such as an earlier gateway."""
    if start_s is None or instance.model is None:
        return
    lesson = state.lesson_of(instance.model.name)
    if lesson.start_s is None:
        _learn(state, instance, replace(lesson, start_s=start_s))


def _watch_residual(state: State, instance: Instance, level: int, held_bytes: int) -> None:
    """Stop an instance whose sleeps leave more and more (engines.md, rule 5): it starts anew when it is next wanted."""
    least = min(held_bytes, instance.least_held_bytes.get(level, held_bytes))
    instance.least_held_bytes[level] = least
    if held_bytes - least > max(_LEAK_BYTES, _LEAK_SHARE * instance.vram_bytes):
        instance.release = Release(instance.unit)


def learn_size(state: State, event: Measured) -> None:
    """An awake instance that holds more than it was reckoned with is reckoned with that from now on, and ever after."""
    instance = state.instances.get(event.unit)
    if instance is None or instance.model is None or instance.phase is not Phase.READY or instance.pending is not None:
        return
    lesson, seen = state.lesson_of(instance.model.name), min(event.vram_bytes, _most(state, instance))
    if seen > lesson.peak_bytes:
        _learn(state, instance, replace(lesson, peak_bytes=seen))
    instance.vram_bytes = max(instance.vram_bytes, seen)


def _most(state: State, instance: Instance) -> int:
    """What its largest GPU may give it: what has run once must not be reckoned with more, or it would never fit again."""
    gpus = (gpu for gpu in instance.unit.placement.gpus if gpu in state.gpus)
    return int(max((state.empty()[gpu] for gpu in gpus), default=0))


def raise_size(state: State, instance: Instance, model: Model) -> bool:
    """Reckon with more memory after a start ran out of it, and say whether to try again: once, after freeing more.

    Never with more than a GPU has: a start that fails although it has one to itself is to say why.
    """
    again = model.name not in state.retried
    state.retried.add(model.name)
    raised = min(int(max(instance.vram_bytes * _RAISE, _room(state, instance))), _most(state, instance))
    _learn(state, instance, replace(state.lesson_of(model.name), raised_bytes=raised))
    return again


def _room(state: State, instance: Instance) -> float:
    """What the others left of its fullest GPU: if that did not do, it needs more."""
    held = plus(other.holds() for other in state.instances.values() if other is not instance)
    gpus = (state.gpus[gpu] for gpu in instance.unit.placement.gpus if gpu in state.gpus)
    rooms = (gpu.total_bytes - held.get(gpu.index, 0) - state.foreign.get(gpu.index, 0) for gpu in gpus)
    return min(rooms, default=0.0)


def learn_sample(state: State, gpus: tuple[GpuSample, ...]) -> None:
    """Take over what was measured. Foreign use is what our instances do not account for.

    While the memory of a GPU is being changed the books are ahead of (or behind) the device, so the last value stays.
    """
    held = plus(instance.holds() for instance in state.instances.values())
    state.gpus = {gpu.index: gpu for gpu in gpus}
    changing = {gpu for i in state.instances.values() if i.changing for gpu in i.unit.placement.gpus}
    for gpu in gpus:
        if gpu.used_bytes is not None and gpu.index not in changing:
            state.foreign[gpu.index] = max(0.0, gpu.used_bytes - held.get(gpu.index, 0))


def learn_gauge(state: State, resource: str, free: float) -> None:
    """Take over what is free of a resource: our instances may hold that and what they hold already.

    While one of them takes or gives back some of it the last value stays. When there is none yet, what such instances hold
    is not reckoned with: they may have taken nothing so far.
    """
    holders = state.holders(resource)
    steady = [i for i in holders if not i.changing]
    if len(steady) < len(holders) and resource in state.gauged:
        return
    held = sum(i.holds()[resource] for i in steady)
    state.gauged[resource] = min(state.empty().get(resource, 0), free + held)


def same_gauge(resource: str, before: Config, after: Config) -> bool:
    """Whether what was read of a resource under one configuration counts under another."""
    if resource == RAM:
        return after.resources.ram_bytes is None
    return before.resources.commands.get(resource) == after.resources.commands.get(resource)
