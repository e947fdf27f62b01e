"""Models that are pending until an engine was ready with their definition, and the trials that see to that."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import World, config_of, sim

from mmd.config import EngineKind, Model
from mmd.gateway.stage import model_state
from mmd.names import Placement, UnitName
from mmd.policy.actions import Sleep, Start, Stop
from mmd.policy.events import GpuSample, Measured, Observed, Phase, Reconfigured, Reset, Sampled, Verify
from mmd.policy.lesson import Lesson
from mmd.policy.trial import verified
from mmd.status import ModelState


def unit(model: str, *gpus: int) -> UnitName:
    return UnitName(model, Placement(gpus or (0,)))


def last(world: World) -> object:
    return world.actions[-1]


def state_of(world: World, name: str) -> ModelState:
    state = world.scheduler.state
    return model_state(state, state.config.models[name])


def test_a_model_is_pending_until_a_request_has_started_it() -> None:
    world = World(config_of(sim("a", 14)), 24)
    assert state_of(world, "a") is ModelState.PENDING
    request = world.arrive("a")
    world.complete(unit("a"))
    assert request in world.admitted
    world.finish(request)
    world.release(unit("a"), 0)
    world.complete(unit("a"))
    assert state_of(world, "a") is ModelState.STOPPED, "it has worked, and still would"


def test_a_trial_starts_a_model_in_free_memory_and_leaves_it_there() -> None:
    world = World(config_of(sim("a", 14)), 24)
    assert world.post(Verify("a")) == [Start(unit("a"))]
    world.complete(unit("a"))
    assert state_of(world, "a") is ModelState.READY
    assert not world.scheduler.state.trials
    assert world.post(Verify("a")) == [], "it is known to work"


@pytest.mark.parametrize("asleep", [False, True])
def test_a_trial_takes_nothing_from_anybody_and_begins_when_memory_is_free(*, asleep: bool) -> None:
    world = World(config_of(sim("a", 14), sim("b", 12)), 24)
    request = world.arrive("a")
    world.complete(unit("a"))
    world.finish(request)
    world.pass_time(3600)
    assert world.post(Verify("b")) == []
    assert state_of(world, "b") is ModelState.PENDING
    assert not any(isinstance(action, Sleep | Stop) for action in world.actions)
    world.release(unit("a"), 1 if asleep else 0)
    world.complete(unit("a"))
    assert last(world) == Start(unit("b"))


def test_a_trial_waits_behind_those_who_wait() -> None:
    """b waits for memory that a holds: what is free is not given to c meanwhile, or more would have to leave."""
    world = World(config_of(sim("a", 10), sim("b", 20), sim("c", 6)), 24)
    world.arrive("a")  # it stays in flight
    world.complete(unit("a"))
    waiting = world.arrive("b")
    assert world.post(Verify("c")) == []
    world.cancel(waiting)
    assert last(world) == Start(unit("c"))


def test_a_failed_trial_is_a_failed_model_until_it_is_tried_again() -> None:
    world = World(config_of(sim("a", 14)), 24)
    world.post(Verify("a"))
    world.complete(unit("a"), ok=False)
    assert state_of(world, "a") is ModelState.FAILED
    assert not world.scheduler.state.trials
    world.pass_time(3600)
    assert world.actions == [Start(unit("a"))], "nobody asked for more"
    assert world.post(Verify("a")) == [Start(unit("a"))]
    world.complete(unit("a"))
    assert state_of(world, "a") is ModelState.READY


def test_a_trial_of_what_can_never_fit_says_so() -> None:
    world = World(config_of(sim("huge", 40)), 24)
    assert world.post(Verify("huge")) == []
    assert "can never fit" in world.scheduler.state.failures["huge"].reason
    assert state_of(world, "huge") is ModelState.FAILED


def test_an_operator_who_stops_a_trial_is_believed() -> None:
    world = World(config_of(sim("a", 14)), 24)
    world.post(Verify("a"))
    world.release(unit("a"), 0)
    world.complete(unit("a"))
    world.pass_time(60)
    assert world.actions == [Start(unit("a")), Stop(unit("a"))]
    assert state_of(world, "a") is ModelState.PENDING


def test_what_was_learned_of_a_definition_says_that_it_works_and_another_definition_is_pending() -> None:
    world = World(config_of(sim("a", 14)), 24)
    config = config_of(sim("a", 14))
    world.post(Reconfigured(config, {"a": "d2"}, world.ram, {"a": Lesson(start_s=3.0)}))
    assert state_of(world, "a") is ModelState.STOPPED
    world.post(Reset("a"))
    assert state_of(world, "a") is ModelState.PENDING, "forgotten with the rest"
    world.post(Reconfigured(config, {"a": "d3"}, world.ram, {}))
    assert state_of(world, "a") is ModelState.PENDING


def test_a_start_by_somebody_else_counts_if_it_was_of_this_definition() -> None:
    world = World(config_of(sim("a", 14), sim("b", 6)), 24)
    for name, definition in (("a", "d1"), ("b", "old")):
        world.post(Observed(unit(name), Phase.READY, definition=definition, start_s=4.5))
    state = world.scheduler.state
    assert (state.lesson_of("a").start_s, state.lesson_of("b").start_s) == (4.5, None)
    assert [verified(state, model) for model in state.config.models.values()] == [True, False]


def test_a_new_definition_is_tried_when_the_old_one_has_left() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a")
    world.complete(unit("a"))
    world.post(Reconfigured(world.config, {"a": "d2"}, world.ram))
    world.scheduler.state.instances[unit("a")].definition = "d1"
    world.post(Reconfigured(world.config, {"a": "d2"}, world.ram))
    assert world.post(Verify("a")) == []
    world.finish(request)
    assert last(world) == Stop(unit("a"))
    world.complete(unit("a"))
    assert last(world) == Start(unit("a"))


def test_models_that_mmd_does_not_start_and_those_that_are_gone_are_not_tried() -> None:
    world = World(config_of(Model("far", "far", EngineKind.EXTERNAL, gpus=0), sim("a", 14), sim("b", 14)), 24)
    for name in ("far", "nobody"):
        assert world.post(Verify(name)) == []
    world.arrive("a")
    world.post(Verify("b"))
    world.complete(unit("a"))
    world.post(Reconfigured(config_of(sim("a", 14)), {"a": "d1"}, world.ram))
    assert not world.scheduler.state.trials


def test_gpus_that_are_not_known_yet_are_waited_for() -> None:
    world = World(config_of(sim("a", 14)), 24)
    world.scheduler.state.gpus.clear()
    world.scheduler.state.gpus_awaited = True
    assert world.post(Verify("a")) == []
    assert world.post(Sampled((GpuSample(0, 24 << 30),))) == [Start(unit("a"))]


_STEPS = st.lists(
    st.tuples(st.sampled_from(["verify", "arrive", "finish", "complete", "fail", "pass", "release"]), st.integers(0, 5)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(_STEPS, st.booleans())
def test_trials_never_make_anybody_leave(steps: list[tuple[str, int]], workers: bool) -> None:
    """With requests for `a` and `b` only, which fit together, nothing is ever evicted, whatever is tried; the world checks that
    what starts fits."""
    names = ["a", "b", "c", "d", "e", "f"]
    world = World(config_of(sim("a", 6), sim("b", 6), *(sim(name, 9) for name in names[2:])), 24, workers=workers)
    released: set[UnitName] = set()
    for what, number in steps:
        name, admitted, pending = names[number], sorted(world.admitted), sorted(world.pending)
        if what == "verify":
            world.post(Verify(name))
        elif what == "arrive" and not any(unit(other) in world.units for other in names[2:]):
            world.arrive(names[number % 2])
        elif what == "finish" and admitted:
            world.finish(admitted[number % len(admitted)])
        elif what in ("complete", "fail") and pending:
            world.complete(pending[number % len(pending)], ok=what == "complete")
        elif what == "pass":
            world.pass_time(number * 10)
        elif what == "release" and unit(name) in world.units:
            released.add(unit(name))
            world.release(unit(name), 0)
        for lent, recalled in list(world.lent.items()):
            if recalled:
                world.give_back(lent)
    assert {action.unit for action in world.actions if isinstance(action, Stop)} <= released
    assert not any(isinstance(action, Sleep) for action in world.actions)


@pytest.mark.parametrize("after", [{}, {"a": "another"}], ids=["removed", "replaced"])
def test_what_starts_by_an_earlier_definition_teaches_nothing(after: dict[str, str]) -> None:
    """The lessons are those of the definitions in force: of a model that has gone nobody could say which one to keep."""
    world = World(config_of(sim("a", 14)), 24)
    world.post(Reconfigured(world.config, {"a": "the first"}, world.ram))
    world.arrive("a")
    config = world.config if after else world.config._replace(models={})
    world.post(Reconfigured(config, after, world.ram))
    world.complete(unit("a"))
    world.post(Measured(unit("a"), 13 << 30))
    state = world.scheduler.state
    assert state.lessons.keys() == after.keys()
    assert not after or not verified(state, config.models["a"])
