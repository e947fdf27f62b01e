"""Amounts of resources: GPU memory by GPU index, and by name whatever else is counted (`ram`, `license`).

An amount is a mapping from resource to number; a resource that is absent counts as zero. Memory is in bytes.
"""

from collections.abc import Iterable, Mapping

from mmd.config import Model
from mmd.engines import engine
from mmd.names import Placement

__all__ = [
    "RAM",
    "Amounts",
    "Key",
    "asleep_amounts",
    "awake_amounts",
    "covers",
    "largest",
    "minus",
    "more_of",
    "plus",
    "shortfall",
]

Key = int | str
Amounts = Mapping[Key, float]

RAM = "ram"


def plus(parts: Iterable[Amounts]) -> dict[Key, float]:
    """The sum of all parts."""
    total: dict[Key, float] = {}
    for part in parts:
        for key, amount in part.items():
            total[key] = total.get(key, 0) + amount
    return total


def largest(one: Amounts, other: Amounts) -> dict[Key, float]:
    """Of each resource the larger amount."""
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in {**one, **other}}


def minus(whole: Amounts, part: Amounts) -> dict[Key, float]:
    """`whole` less `part`; may go below zero."""
    return {key: whole.get(key, 0) - part.get(key, 0) for key in {**whole, **part}}


def shortfall(need: Amounts, free: Amounts) -> dict[Key, float]:
    """What is missing of each resource that `need` asks for; empty when `free` covers it."""
    return {key: amount - free.get(key, 0) for key, amount in need.items() if amount > free.get(key, 0)}


def more_of(after: Amounts, before: Amounts) -> dict[Key, float]:
    """What `after` has more than `before`, of each resource that it has more of."""
    return {key: amount - before.get(key, 0) for key, amount in after.items() if amount > before.get(key, 0)}


def covers(free: Amounts, need: Amounts) -> bool:
    return not shortfall(need, free)


def awake_amounts(model: Model, placement: Placement, vram_bytes: int) -> dict[Key, float]:
    """What an instance with `vram_bytes` per GPU holds from the moment it starts."""
    amounts: dict[Key, float] = dict.fromkeys(placement.gpus, vram_bytes)
    if model.ram_bytes:
        amounts[RAM] = model.ram_bytes
    for name, amount in model.resources.items():
        amounts[name] = amounts.get(name, 0) + amount
    return amounts


def asleep_amounts(
    model: Model, placement: Placement, vram_bytes: int, level: int, *, held_bytes: int | None
) -> dict[Key, float]:
    """What it holds while asleep: of each GPU `held_bytes` where that was measured, else the engine's prior; and host memory
    for what it moved there."""
    known = model if model.vram_bytes is not None else model._replace(vram_bytes=vram_bytes)
    residual = engine(model.engine).residual_bytes(known, level) if held_bytes is None else held_bytes
    amounts = awake_amounts(model, placement, vram_bytes)
    amounts.update({gpu: min(residual, amounts[gpu]) for gpu in placement.gpus})
    host = engine(model.engine).host_bytes(known, level)
    if host:
        amounts[RAM] = amounts.get(RAM, 0) + host
    return amounts
