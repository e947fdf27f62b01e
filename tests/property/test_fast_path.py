"""Most requests pass the scheduler without a round of decisions. What it decides must be the same as with one."""

import copy
import random
from typing import cast

import pytest
from world import World, config_of, sim

from mmd.config import Idle, Replicas
from mmd.policy import Scheduler
from mmd.policy.actions import Action
from mmd.policy.events import Arrived, Event, Finished, Tick
from mmd.policy.state import State

_STEPS = 250


class _Both:
    """A scheduler that handles each arrival and end in both ways, and compares. (Compiled, it has no subclasses.)"""

    def __init__(self) -> None:
        self._scheduler = Scheduler()
        self.deadline = self._scheduler.deadline
        self.at_once = 0

    @property
    def state(self) -> State:
        return self._scheduler.state

    def handle(self, event: Event, now: float) -> list[Action]:
        if not isinstance(event, Arrived | Finished):
            return self._scheduler.handle(event, now)
        twin = self._twin()
        expected = twin._learn(event, now) + twin._settle(now)
        actions = self._scheduler.handle(event, now)
        self.at_once += bool(isinstance(event, Arrived) and actions)
        after = self._twin()
        assert sorted(map(str, actions + after.handle(Tick(), now))) == sorted(map(str, expected))
        assert after.state.admitted == twin.state.admitted
        assert after.state.instances == twin.state.instances
        assert after.state.queues == twin.state.queues
        assert after.state.traffic == twin.state.traffic
        assert after.state.crowded == twin.state.crowded
        return actions

    def _twin(self) -> Scheduler:
        """A copy that shares nothing but the configuration, which nobody changes."""
        config = self.state.config
        shared = [config, *config.models.values()]
        twin = Scheduler()
        twin.state = copy.deepcopy(self.state, {id(each): each for each in shared})
        return twin


@pytest.mark.parametrize("seed", range(6))
def test_requests_let_in_at_once_are_those_that_a_round_would_let_in(seed: int) -> None:
    dice = random.Random(seed)
    models = [sim("a", 10, concurrency=2), sim("b", 8), sim("c", 12, idle=Idle(sleep_after_s=20, stop_after_s=60)), sim("d", 4)]
    models.append(sim("e", 5, replicas=Replicas(max=2, target_in_flight=2)))
    world = World(config_of(*models, min_residency_s=2.0), 24, 16)
    both = _Both()
    for event, now in world.trace:
        both.handle(event, now)
    world.scheduler = cast("Scheduler", both)
    for _ in range(_STEPS):
        match dice.randrange(10):
            case 0 | 1 | 2 | 3:
                world.arrive(dice.choice("aabbbcdeee"))
            case 4 | 5 | 6 if world.admitted:
                world.finish(dice.choice(sorted(world.admitted)))
            case 7 if world.pending:
                world.complete(dice.choice(sorted(world.pending)))
            case 8 if world.waiting:
                world.cancel(dice.choice(sorted(world.waiting)))
            case _:
                world.pass_time(dice.choice((0.1, 1.0, 10.0)))
    assert both.at_once > 10
