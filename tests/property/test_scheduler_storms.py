"""The scheduler under 2,000 random traces, each until everybody has been served: invariants, no starvation, the same twice.

Hypothesis (test_scheduler.py) finds short traces that break something; these are long ones, such as real traffic makes.
A failing seed is printed; run it alone with `storm(SEED)`, and keep what it found as a named example.
"""

import random

import pytest
from test_scheduler import MODELS
from world import World, config_of

from mmd.config import Config, Evict
from mmd.policy import Scheduler
from mmd.policy.actions import Refusal
from mmd.policy.events import Phase, Reconfigured

_TRACES = 2000
_BATCHES = 20
_STEPS = 60


def _config(dice: random.Random) -> Config:
    config = config_of(*dice.sample(MODELS, dice.randint(2, 7)))
    return config._replace(policy=config.policy._replace(evict=dice.choice(list(Evict))))


def _step(world: World, dice: random.Random, names: list[str]) -> None:
    """One thing that happens; many of them find nothing to happen to."""
    match dice.randrange(13):
        case 0 | 1 | 2:
            world.arrive(dice.choice(names), operator=dice.random() < 0.2)
        case 3 if world.waiting:
            world.cancel(dice.choice(sorted(world.waiting)))
        case 4 if world.admitted:
            world.finish(dice.choice(sorted(world.admitted)))
        case 5 | 6 if world.pending:
            unit = dice.choice(sorted(world.pending))
            world.complete(unit, ok=dice.random() > 0.15, keeps=dice.random() < 0.15, out_of_memory=dice.random() < 0.5)
        case 7:
            alive = [unit for unit in sorted(world.units) if unit not in world.pending and _serves(world, unit)]
            if alive and dice.random() < 0.3:
                world.crash(dice.choice(alive))
        case 8 if world.units:
            world.release(dice.choice(sorted(world.units)), dice.choice([0, 1]), force=dice.random() < 0.3)
        case 9 if dice.random() < 0.15:
            definitions = {name: dice.choice(["d1", "d2"]) for name in names}
            world.post(Reconfigured(world.config, definitions, world.ram))
        case 10 if world.lent:
            world.admit_elsewhere(dice.choice(sorted(world.lent)))
        case 11 if world.elsewhere:
            world.finish_elsewhere(dice.choice(sorted(world.elsewhere)))
        case 12 if any(world.lent.values()):
            world.give_back(dice.choice(sorted(unit for unit, recalled in world.lent.items() if recalled)))
        case 12 if world.elsewhere:
            world.survey()
        case 9:
            world.pass_time(dice.choice([0.5, 3.0, 11.0, 61.0, 300.0]))


def _serves(world: World, unit: object) -> bool:
    return world.units[unit].phase in (Phase.READY, Phase.SLEEPING)  # type: ignore[index]


def storm(seed: int) -> None:
    """One trace; its World checks the invariants at every step."""
    dice = random.Random(seed)
    config = _config(dice)
    world = World(
        config, *dice.choice([(24,), (24, 24), (16, 24)]), ram_gib=dice.choice([0, 16, 32, 64]), workers=seed % 2 == 1
    )
    for _ in range(_STEPS):
        _step(world, dice, list(config.models))
        assert world.scheduler._settle(world.now) == [], "a decision was left for later"
    before = set(world.refused)
    world.settle()
    assert not world.waiting, f"still waiting after everything ended: {world.waiting}"
    late = [r for request, r in world.refused.items() if request not in before and r.why is Refusal.WAITED_TOO_LONG]
    assert not late or any(model.pin for model in config.models.values()), late
    again = Scheduler()
    assert [action for event, now in world.trace for action in again.handle(event, now)] == world.actions


@pytest.mark.parametrize("batch", range(_BATCHES))
def test_storm(batch: int) -> None:
    size = _TRACES // _BATCHES
    for seed in range(batch * size, (batch + 1) * size):
        try:
            storm(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
