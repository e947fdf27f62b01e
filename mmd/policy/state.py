"""Everything the scheduler remembers, and the questions that its parts ask of it."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

from mmd.config import Config, Idle, Model
from mmd.names import CPU, Placement, UnitName, divided_gpu, is_slice
from mmd.policy.events import GpuSample, Phase
from mmd.policy.instance import Claim, Failures, Instance, Waiter
from mmd.policy.ledger import RAM, Key, minus, plus
from mmd.policy.lesson import Lesson
from mmd.policy.traffic import Traffic
from mmd.sizes import vram_bytes

__all__ = ["State"]


# All choices of GPUs on machines with 8 (4 of 8 is 70); on larger ones planning would take longer than a request may.
_CHOICES_MAX = 70


@dataclass(slots=True)
class State:
    config: Config = field(default_factory=Config)
    definitions: Mapping[str, str] = field(default_factory=dict)
    host_ram_bytes: float = 0
    gpus: dict[int, GpuSample] = field(default_factory=dict)
    foreign: dict[int, float] = field(default_factory=dict)
    """Per GPU, bytes used by others than our instances."""
    gauged: dict[str, float] = field(default_factory=dict)
    """Per resource that has a gauge and was read: what our instances may hold in all."""
    instances: dict[UnitName, Instance] = field(default_factory=dict)
    waiting: dict[int, Waiter] = field(default_factory=dict)
    queues: dict[str, deque[Waiter]] = field(default_factory=dict)
    """Per model name, oldest first; never an empty one."""
    admitted: dict[int, UnitName] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    lessons: dict[str, Lesson] = field(default_factory=dict)
    """By model name: what was learned of its present definition."""
    pins: dict[str, bool] = field(default_factory=dict)
    """By model name: what an operator said at run time, which goes before the configuration."""
    retried: set[str] = field(default_factory=set)
    """Models whose last start ran out of memory and is tried once more."""
    paused: bool = False
    """Decisions are another gateway's for now."""
    preload: set[str] = field(default_factory=set)
    """Models that lack instances which are to stand by."""
    trials: set[str] = field(default_factory=set)
    """Models that are to be started once to see whether they work."""
    crowded: dict[str, float] = field(default_factory=dict)
    """Models that have more to do than their instances should, and since when."""
    gpus_awaited: bool = True
    """Nothing has been heard of the GPUs yet, neither good nor bad: models that need one wait."""
    gpu_problem: str = ""
    """Why the GPUs cannot be read, when they cannot; what was last known of them, foreign use included, stays in force."""
    serial: int = 0
    """Of the last action."""
    lending: bool = False
    """There are workers to lend instances to."""
    lent: set[UnitName] = field(default_factory=set)
    """Units that others may admit requests to without asking, those included that are no more."""
    recalled: set[UnitName] = field(default_factory=set)
    """Of these, the ones of which it is not yet known that they do not any more."""

    def model_of(self, unit: UnitName) -> Model | None:
        """The configured model that a unit belongs to, by its id."""
        return next((m for m in self.config.models.values() if m.id == unit.id), None)

    def instances_of(self, model: Model) -> list[Instance]:
        return [i for i in self.instances.values() if i.unit.id == model.id]

    def traffic_of(self, model: str) -> Traffic:
        traffic = self.traffic.get(model)
        if traffic is None:
            traffic = self.traffic[model] = Traffic()
        return traffic

    def lesson_of(self, model: str) -> Lesson:
        return self.lessons.get(model, Lesson())

    def vram_of(self, model: Model) -> int:
        """Bytes per GPU that a start of `model` is reckoned with: what is declared, or has been seen if that is more.

        What is only estimated gives way to what has been seen.
        """
        lesson = self.lesson_of(model.name)
        seen = max(lesson.peak_bytes, lesson.raised_bytes)
        return seen if seen and model.vram_bytes is None else max(vram_bytes(model), seen)

    def waiters_of(self, unit: UnitName) -> int:
        model = self.model_of(unit)
        return len(self.queues.get(model.name, ())) if model else 0

    def locked(self, placement: Placement) -> bool:
        """Whether the memory of one of these GPUs is being changed by somebody."""
        gpus = set(placement.gpus)
        return any(i.changing and gpus.intersection(i.unit.placement.gpus) for i in self.instances.values())

    def empty(self) -> dict[Key, float]:
        """What our instances could hold if nobody else used anything: per GPU total - reserve, and the named resources.

        There is no end to those that a command tells, which says what is free, not how much there is.
        """
        reserve = self.config.gpus.reserve_bytes
        gpus: dict[Key, float] = {gpu.index: max(0, gpu.total_bytes - reserve) for gpu in self.gpus.values()}
        ram = self.config.resources.ram_bytes
        named: dict[Key, float] = dict(self.config.resources.amounts.items())
        named.update(dict.fromkeys(self.config.resources.commands, math.inf))
        return {**gpus, RAM: self.host_ram_bytes if ram is None else ram, **named}

    def holders(self, resource: str) -> list[Instance]:
        """The instances that hold some of a named resource."""
        return [i for i in self.instances.values() if i.holds().get(resource)]

    def stand(self, resource: str) -> frozenset[tuple[UnitName, float]]:
        """Who holds some of a named resource, and since when as it does now: two that are equal had no change between them."""
        return frozenset((i.unit, i.since) for i in self.holders(resource))

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def is_pinned(self, model: Model) -> bool:
        """Whether it never makes room for others."""
        return self.pins.get(model.name, model.pin)

    def pinned(self, model: Model) -> dict[Key, float]:
        """What pinned residents hold and will not give up by themselves either, `model`'s own apart."""
        others = [i for i in self.resident() if i.model is not None and self.is_pinned(i.model) and i.unit.id != model.id]
        return plus(i.holds() for i in others if i.model and i.model.idle == Idle())

    def budget(self) -> dict[Key, float]:
        """What our instances may hold in all: `empty` less what others use. Of what no command has told yet: nothing."""
        whole = minus(self.empty(), {key: self.foreign.get(key, 0) for key in self.gpus})
        gauged: dict[Key, float] = dict(self.gauged.items())
        return {**whole, **dict.fromkeys(self.config.resources.commands, 0.0), **gauged}

    def free_now(self) -> dict[Key, float]:
        """Budget less what every instance holds at this moment: what a start may use at once."""
        return minus(self.budget(), plus(i.holds() for i in self.instances.values()))

    def free_later(self) -> dict[Key, float]:
        """Budget less promises and less what will be held once everything on its way out has left: what may be promised."""
        held = plus(self._held_later(i) for i in self.instances.values())
        return minus(self.budget(), plus((held, *(claim.need for claim in self.claims.values()))))

    def leaving(self) -> dict[UnitName, int]:
        """Instances on their way out, with the level they go down to: victims, released ones, pending actions."""
        found = {unit: level for claim in self.claims.values() for unit, level in claim.victims.items()}
        for unit, instance in self.instances.items():
            level = instance.release.level if instance.release else instance.leaving_to()
            if level is not None:
                found[unit] = level
        return found

    def _held_later(self, instance: Instance) -> dict[Key, float]:
        level = self.leaving().get(instance.unit)
        if level is None:
            return instance.holds()
        return instance.holds_after(level, held_bytes=self.held_asleep(instance, level))

    def held_asleep(self, instance: Instance, level: int) -> int | None:
        """What the last sleep of this model at `level` left on each GPU, if it was measured."""
        if instance.model is None:
            return None
        return self.lesson_of(instance.model.name).held_bytes.get(level)

    def placements(self, model: Model) -> list[Placement]:
        """Where a model may go: its explicit GPUs, or every choice of its count. Of several GPUs none is a slice: a process can
        use one slice at most (CUDA)."""
        if model.gpu_count == 0:
            return [CPU]
        usable = sorted(gpu for gpu in self.gpus if model.gpu_count == 1 or not is_slice(gpu))
        if isinstance(model.gpus, int):
            return _choices(usable, model.gpus)
        chosen = product(*([gpu for gpu in usable if self._is_named(gpu, name)] for name in model.gpus))
        return [Placement(tuple(sorted(gpus))) for gpus in chosen if len(set(gpus)) == len(gpus)]

    def _is_named(self, gpu: int, name: int | str) -> bool:
        """Whether a model's `gpus` mean this GPU by `name`, its index or UUID; a slice goes by its divided GPU's as well."""
        known = self.gpus[gpu]
        return name in (gpu, known.uuid) or (is_slice(gpu) and name in (divided_gpu(gpu)[0], known.parent_uuid))

    def resident(self) -> Iterable[Instance]:
        """Instances that hold memory and are in nobody's hands: awake or asleep, nothing pending."""
        return (i for i in self.instances.values() if i.phase in (Phase.READY, Phase.SLEEPING) and i.pending is None)


def _choices(gpus: list[int], count: int) -> list[Placement]:
    """Every choice of `count` GPUs; of many, those that are neighbours, which are also the ones with the fastest links."""
    if math.comb(len(gpus), count) <= _CHOICES_MAX:
        return [Placement(chosen) for chosen in combinations(gpus, count)]
    return [Placement(tuple(gpus[first : first + count])) for first in range(len(gpus) - count + 1)]
