"""Replicas by named example: when a further instance starts, where, for whom it makes room, and who leaves first."""

from test_policy_scenarios import last, serve, unit
from world import World, config_of, sim

from mmd.config import Idle, Replicas
from mmd.names import UnitName
from mmd.policy.actions import Admit, Refuse, Sleep, Start, Stop, Wake
from mmd.policy.events import Phase

_TWO = Replicas(max=2, target_in_flight=1)


def crowd(world: World, model: str, count: int = 2) -> list[int]:
    return [world.arrive(model) for _ in range(count)]


def up(world: World, *units: UnitName) -> None:
    """Nothing else is ready."""
    assert {u for u, state in world.units.items() if state.phase is Phase.READY} == set(units)


def test_a_crowd_that_lasts_as_long_as_a_start_brings_a_further_instance() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO)), 24, 24)
    assert serve(world, "a") == unit("a", 0)
    first = crowd(world, "a")
    world.pass_time(9.9)
    assert isinstance(last(world), Admit), "a start takes 30 s, a crowd of 10 s is patience enough"
    world.pass_time(0.2)
    assert last(world) == Start(unit("a", 1))
    world.complete(unit("a", 1))
    assert world.admitted[world.arrive("a")] == unit("a", 1), "the least loaded"
    assert [world.admitted[request] for request in first] == [unit("a", 0)] * 2


def test_a_short_crowd_brings_none() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO)), 24, 24)
    serve(world, "a")
    for _ in range(5):
        for request in crowd(world, "a"):
            world.pass_time(3)
            world.finish(request)
        world.pass_time(1)
    up(world, unit("a", 0))
    assert not world.pending


def test_waiters_count_where_concurrency_holds_them_back() -> None:
    world = World(config_of(sim("a", 14, concurrency=1, replicas=Replicas(max=2))), 24, 24)
    serve(world, "a")
    served, waiting = crowd(world, "a")
    world.pass_time(11)
    world.complete(unit("a", 1))
    assert last(world) == Admit(waiting, unit("a", 1))
    assert world.admitted[served] == unit("a", 0)


def test_there_are_never_more_than_max() -> None:
    world = World(config_of(sim("a", 7, replicas=_TWO)), 24, 24, 24)
    serve(world, "a")
    crowd(world, "a", 20)
    world.pass_time(20)
    world.complete(unit("a", 1))
    crowd(world, "a", 20)
    world.pass_time(100)
    up(world, unit("a", 0), unit("a", 1))
    assert not world.pending


def test_replicas_do_not_share_a_gpu() -> None:
    world = World(config_of(sim("a", 7, replicas=_TWO)), 24)
    serve(world, "a")
    crowd(world, "a")
    world.pass_time(100)
    up(world, unit("a", 0))
    assert not world.pending


def test_a_replica_takes_the_place_of_an_idle_model_that_is_asked_for_less() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO), sim("b", 16)), 24, 24)
    serve(world, "b")
    serve(world, "a")
    for _ in range(10):
        world.finish(world.arrive("a"))
    crowd(world, "a")
    world.pass_time(11)
    where = next(u for u in world.units if u.id == "b")
    assert isinstance(last(world), Sleep)
    world.complete(where)
    assert last(world) == Start(UnitName("a", where.placement))


def test_a_replica_leaves_those_alone_that_are_asked_for_more() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO), sim("b", 16)), 24, 24)
    serve(world, "a")
    serve(world, "b")
    for _ in range(10):
        world.finish(world.arrive("b"))
    crowd(world, "a")
    world.pass_time(60)
    assert not world.pending


def test_a_further_instance_is_the_first_to_leave() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO), sim("b", 3), sim("c", 16)), 24, 24)
    serve(world, "a")
    served = crowd(world, "a")
    world.pass_time(11)
    world.complete(unit("a", 1))
    for request in served:
        world.finish(request)
    serve(world, "b")
    world.pass_time(11)
    request = world.arrive("c")
    assert isinstance(last(world), Sleep)
    assert last(world).unit == unit("a", 1)  # type: ignore[attr-defined]
    world.complete(unit("a", 1))
    assert last(world) == Start(unit("c", 1))
    world.complete(unit("c", 1))
    assert request in world.admitted


def test_a_sleeping_replica_is_woken_rather_than_another_started() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO, idle=Idle(sleep_after_s=30))), 24, 24, 24)
    serve(world, "a")
    for request in crowd(world, "a"):
        world.pass_time(11)
        if world.pending:
            world.complete(unit("a", 1))
        world.finish(request)
    world.finish(world.arrive("a"))
    world.pass_time(29)
    world.finish(world.arrive("a"))
    world.pass_time(10)
    world.complete(unit("a", 1))
    assert world.units[unit("a", 1)].phase is Phase.SLEEPING, "it was idle, the first one was not"
    crowd(world, "a")
    world.pass_time(2)
    assert last(world) == Wake(unit("a", 1), 1), "after as long as waking is reckoned to take"


def test_min_replicas_stand_by_and_come_back() -> None:
    model = sim("a", 14, replicas=Replicas(min=2, max=2), idle=Idle(stop_after_s=60))
    world = World(config_of(model, sim("b", 16)), 24, 24)
    world.complete(unit("a", 0))
    world.complete(unit("a", 1))
    world.pass_time(600)
    up(world, unit("a", 0), unit("a", 1))
    request = world.arrive("b")
    where = next(iter(world.pending))
    world.complete(where)
    world.complete(UnitName("b", where.placement))
    world.finish(request)
    world.pass_time(60)
    assert not world.pending, "b is idle, and who stands by waits for free memory"
    world.release(UnitName("b", where.placement), 0)
    world.complete(UnitName("b", where.placement))
    assert last(world) == Wake(where, 1)
    world.complete(where)
    up(world, unit("a", 0), unit("a", 1))


def test_who_was_stopped_by_an_operator_does_not_stand_by() -> None:
    world = World(config_of(sim("a", 14, replicas=Replicas(min=1))), 24)
    world.complete(unit("a"))
    world.release(unit("a"), 0)
    world.complete(unit("a"))
    world.pass_time(600)
    assert last(world) == Stop(unit("a"))


def test_a_replica_that_cannot_start_costs_nobody_an_answer() -> None:
    world = World(config_of(sim("a", 14, concurrency=1, replicas=Replicas(max=2))), 24, 24)
    serve(world, "a")
    served, waiting = crowd(world, "a")
    world.pass_time(11)
    world.complete(unit("a", 1), ok=False)
    assert waiting in world.waiting
    world.finish(served)
    assert waiting in world.admitted
    assert not [action for action in world.actions if isinstance(action, Refuse)]


def test_a_crashed_replica_leaves_its_waiters_to_the_other() -> None:
    world = World(config_of(sim("a", 14, replicas=_TWO)), 24, 24)
    serve(world, "a")
    crowd(world, "a")
    world.pass_time(11)
    world.complete(unit("a", 1))
    world.crash(unit("a", 1))
    assert world.admitted[world.arrive("a")] == unit("a", 0)
