"""How long requests wait, how many may, and when those that are turned away are to come again."""

import pytest
from world import World, config_of, sim

from mmd.config import Config, Model, Replicas
from mmd.names import Placement, UnitName
from mmd.policy.actions import Refusal, Sleep, Start
from mmd.policy.events import Unreachable
from mmd.policy.forecast import ready_in_s, retry_after_s
from mmd.policy.lesson import Lesson


def unit(model: str, *gpus: int) -> UnitName:
    return UnitName(model, Placement(gpus or (0,)))


def taught(config: Config, *gpu_gib: int, **start_s: float) -> World:
    """A world that knows how long starts take."""
    world = World(config, *gpu_gib)
    world.scheduler.state.lessons |= {name: Lesson(start_s=seconds, wake_s=seconds / 10) for name, seconds in start_s.items()}
    return world


def ready_in(world: World, name: str) -> float:
    state = world.scheduler.state
    return ready_in_s(state, state.config.models[name], world.now)


def retry_after(world: World, name: str) -> float:
    state = world.scheduler.state
    return retry_after_s(state, state.config.models[name], world.now)


def limited(queue_limit: int | None, concurrency: int = 2, **more: object) -> Model:
    return sim("a", 10, concurrency=concurrency, queue_limit=queue_limit, **more)


# Bounds of a request's own.


def test_a_request_that_does_not_want_to_wait_longer_is_told_so_in_time() -> None:
    world = taught(config_of(sim("a", 14)), 24, a=40)
    short, long = world.arrive("a", wait_s=5), world.arrive("a", wait_s=3600)
    world.pass_time(4.9)
    assert short in world.waiting
    world.pass_time(0.2)
    refusal = world.refused[short]
    assert (refusal.why, refusal.message) == (Refusal.WAITED_TOO_LONG, "a did not become ready within 5.0 s (X-MMD-Wait)")
    assert refusal.retry_after_s == pytest.approx(35, abs=0.1), "what is left of the start that it has caused"
    assert unit("a") in world.pending, "which goes on"
    world.pass_time(600)
    assert "(gateway.wait_limit)" in world.refused[long].message, "nobody waits beyond that"


def test_a_request_that_does_not_wait_gets_a_ready_model_or_nothing() -> None:
    world = taught(config_of(limited(None)), 24, a=40)
    refusal = world.refused[world.arrive("a", wait_s=0)]
    assert (refusal.why, refusal.retry_after_s) == (Refusal.WAITED_TOO_LONG, 40)
    assert "X-MMD-Wait: 0" in refusal.message
    assert not world.actions[1:], "nothing is started for it"
    world.arrive("a")
    world.complete(unit("a"))
    last_place = world.arrive("a", wait_s=0)
    assert last_place in world.admitted
    assert world.arrive("a", wait_s=0) in world.refused, "it has two requests already"
    world.finish(last_place)
    assert world.arrive("a", wait_s=0) in world.admitted


def test_a_request_whose_engine_was_gone_does_not_wait_longer_for_that() -> None:
    world = World(config_of(sim("a", 14)), 24)
    request = world.arrive("a", wait_s=50)
    world.complete(unit("a"))
    del world.admitted[request]
    world.waiting[request] = "a"
    world.units[unit("a")].serving.clear()
    world.post(Unreachable(request, 7.0))
    world.pass_time(7.1)
    assert "within 7.0 s" in world.refused[request].message


# How many may wait.


def test_a_model_that_is_busy_and_has_a_full_queue_says_so() -> None:
    world = World(config_of(limited(1)), 24)
    loading = [world.arrive("a") for _ in range(3)]
    assert all(request in world.waiting for request in loading), "two places, and one that may wait"
    refusal = world.refused[world.arrive("a")]
    assert refusal.why is Refusal.MODEL_BUSY
    assert refusal.message == "a has all the requests that it may: 2 at a time (concurrency) and 1 that wait (queue_limit)"
    world.complete(unit("a"))
    assert world.arrive("a") in world.refused
    world.finish(loading[0])
    assert world.arrive("a") in world.waiting
    assert world.arrive("a") in world.refused


def test_without_a_queue_of_its_own_a_busy_model_refuses_at_once() -> None:
    world = World(config_of(limited(0)), 24)
    first, second = world.arrive("a"), world.arrive("a")
    world.complete(unit("a"))
    assert world.refused[world.arrive("a")].why is Refusal.MODEL_BUSY
    world.finish(first)
    assert world.arrive("a") in world.admitted
    assert second in world.admitted


def test_an_operator_is_never_turned_away_for_want_of_room() -> None:
    world = World(config_of(limited(0)), 24)
    for _ in range(2):
        world.arrive("a")
    assert world.arrive("a", operator=True) in world.waiting


def test_every_instance_that_is_up_counts() -> None:
    world = World(config_of(limited(0, replicas=Replicas(min=2, max=2))), 24, 24)
    while world.pending:
        world.complete(next(iter(world.pending)))
    admitted = [world.arrive("a") for _ in range(4)]
    assert all(request in world.admitted for request in admitted)
    assert world.refused[world.arrive("a")].why is Refusal.MODEL_BUSY


def test_a_queue_limit_without_concurrency_limits_nothing() -> None:
    world = World(config_of(limited(0, concurrency=0)), 24)
    assert world.arrive("a") in world.waiting
    world.complete(unit("a"))
    assert world.arrive("a") in world.admitted


def test_the_queue_of_all_models_is_full_for_every_one() -> None:
    config = config_of(sim("a", 14))
    world = taught(config._replace(gateway=config.gateway._replace(queue_limit=2)), 24, a=40)
    for _ in range(2):
        world.arrive("a")
    world.pass_time(15)
    refusal = world.refused[world.arrive("a")]
    assert refusal.why is Refusal.QUEUE_FULL
    assert refusal.retry_after_s == pytest.approx(25, abs=0.1)


# When to come again.


def test_a_start_under_way_is_reckoned_to_take_as_long_as_the_last_one() -> None:
    world = taught(config_of(sim("a", 14)), 24, a=40)
    assert ready_in(world, "a") == 40
    world.arrive("a")
    world.pass_time(30)
    assert ready_in(world, "a") == pytest.approx(10, abs=0.1)
    world.pass_time(30)
    assert ready_in(world, "a") == 1, "overdue"
    world.complete(unit("a"))
    assert ready_in(world, "a") == 0


def test_a_model_that_sleeps_is_there_sooner() -> None:
    world = taught(config_of(sim("a", 14), sim("b", 16)), 24, a=40, b=60)
    request = world.arrive("a")
    world.complete(unit("a"), elapsed_s=40)
    world.finish(request)
    world.pass_time(11)
    world.arrive("b")
    assert isinstance(world.pending[unit("a")], Sleep)
    world.complete(unit("a"))
    assert ready_in(world, "a") == pytest.approx(60 + 4, abs=0.1), "after what comes first on the same GPU"


def test_those_that_wait_longer_come_first_on_the_same_gpus_only() -> None:
    config = config_of(sim("a", 20, gpus=(0,)), sim("b", 20, gpus=(0,)), sim("c", 20, gpus=(1,)))
    world = taught(config, 24, 24, a=40, b=60, c=100)
    world.arrive("a")
    world.arrive("c")
    assert isinstance(world.pending[unit("a", 0)], Start)
    assert ready_in(world, "b") == pytest.approx(40 + 60, abs=0.1)
    world.pass_time(1)
    world.arrive("b")
    assert ready_in(world, "b") == pytest.approx(39 + 60, abs=0.1), "it waits for itself once"
    assert ready_in(world, "c") == pytest.approx(99, abs=0.1)


def test_a_busy_model_is_asked_again_when_as_many_as_wait_will_be_through() -> None:
    world = World(config_of(limited(2, concurrency=1)), 24)
    request = world.arrive("a")
    world.complete(unit("a"))
    for _ in range(60):  # each takes five seconds
        world.pass_time(5)
        world.finish(request)
        request = world.arrive("a")
    assert retry_after(world, "a") == pytest.approx(5, rel=0.2)
    for _ in range(2):
        world.arrive("a")
    assert world.refused[world.arrive("a")].retry_after_s == pytest.approx(15, rel=0.2)


def test_what_is_told_stays_within_bounds() -> None:
    world = taught(config_of(sim("a", 14), limited(0)._replace(name="b", id="b")), 24, a=7200)
    assert retry_after(world, "a") == 600
    assert retry_after(world, "b") == 60, "nothing is known of it: as long as a medium model's start"
    world.scheduler.state.lessons["b"] = Lesson(start_s=0.1)
    assert retry_after(world, "b") == 1
