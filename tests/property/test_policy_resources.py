"""Resources that are gauged: what a command or the kernel says is free at a moment becomes a budget that is never overdrawn."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import GIB, Unit, World, config_of, sim

from mmd.config import Config, Gauge, Model, Resources
from mmd.names import Placement, UnitName
from mmd.policy.actions import Refusal, Sleep, Start, Stop
from mmd.policy.events import Gauged, Observed, Phase, Reconfigured

SCRATCH = Resources(commands={"scratch": Gauge(("df-free", "/scratch"))})


NAMES = "abcd"


def alone(name: str, **more: object) -> Model:
    """A model with a GPU of its own: nothing but other resources keeps it from starting."""
    return sim(name, 1, gpus=(NAMES.index(name),), **more)


def needing(name: str, amount: float) -> Model:
    return alone(name, resources={"scratch": amount})


def unit(model: str) -> UnitName:
    return UnitName(model, Placement((NAMES.index(model),)))


def world_of(*models: Model, resources: Resources = SCRATCH, **policy: float) -> World:
    return World(config_of(*models, **policy)._replace(resources=resources), *(24 for _ in NAMES))


def serve(world: World, model: str) -> None:
    request = world.arrive(model)
    world.complete(unit(model))
    world.finish(request)


def started(world: World) -> list[str]:
    return [action.unit.id for action in world.actions if isinstance(action, Start)]


def test_only_a_model_that_needs_it_waits_for_the_first_value() -> None:
    world = world_of(needing("a", 1.0), alone("b"))
    world.arrive("a")
    world.arrive("b")
    assert started(world) == ["b"]
    world.complete(unit("b"))
    world.post(Gauged("scratch", 1.0))
    assert started(world) == ["b", "a"]


def test_a_gauge_that_fails_from_the_first_limits_nothing() -> None:
    world = world_of(needing("a", 5.0), needing("b", 1e18))
    world.arrive("a")
    world.post(Gauged("scratch", math.inf))
    world.complete(unit("a"))
    world.arrive("b")
    assert started(world) == ["a", "b"]


def test_what_an_instance_has_taken_is_not_counted_twice() -> None:
    world = world_of(needing("a", 2.0), needing("b", 2.0), needing("c", 2.0))
    world.post(Gauged("scratch", 4.0))
    serve(world, "a")
    world.post(Gauged("scratch", 2.0))
    world.arrive("b")
    assert started(world) == ["a", "b"], "2 are free, and 2 of 4 are with a"
    world.complete(unit("b"))
    world.post(Gauged("scratch", 0.0))
    assert world.scheduler.state.budget()["scratch"] == 4.0
    assert world.scheduler.state.free_now()["scratch"] == 0.0


def test_with_one_free_only_one_is_up_and_more_lets_both() -> None:
    world = world_of(needing("a", 1.0), needing("b", 1.0))
    world.post(Gauged("scratch", 1.0))
    stream = world.arrive("a")
    world.complete(unit("a"))
    world.post(Gauged("scratch", 0.0))
    world.arrive("b")
    assert started(world) == ["a"]
    world.post(Gauged("scratch", 1.0))
    assert started(world) == ["a", "b"]
    assert stream in world.admitted


def test_an_idle_holder_leaves_for_another_and_sleep_would_not_do() -> None:
    world = world_of(needing("a", 1.0), needing("b", 1.0))
    world.post(Gauged("scratch", 1.0))
    serve(world, "a")
    world.post(Gauged("scratch", 0.0))
    world.pass_time(11)
    world.arrive("b")
    assert world.pending == {unit("a"): Stop(unit("a"))}
    world.complete(unit("a"))
    assert started(world) == ["a", "b"], "what a gave back is there, without another reading"


def test_what_others_take_is_missed_by_the_next_start() -> None:
    world = world_of(needing("a", 2.0), needing("b", 1.0))
    world.post(Gauged("scratch", 4.0))
    serve(world, "a")
    world.post(Gauged("scratch", 0.5))
    world.arrive("b")
    assert started(world) == ["a"]
    world.pass_time(11)
    assert world.actions[-1] == Stop(unit("a"))


def test_a_reading_while_a_holder_changes_is_not_believed() -> None:
    """It may be from before or after the holder took its share."""
    world = world_of(needing("a", 3.0), needing("b", 3.0))
    world.post(Gauged("scratch", 4.0))
    world.arrive("a")
    for free in (4.0, 1.0):
        world.post(Gauged("scratch", free))
        assert world.scheduler.state.budget()["scratch"] == 4.0
    world.arrive("b")
    assert started(world) == ["a"]
    world.complete(unit("a"))
    world.post(Gauged("scratch", 1.0))
    assert world.scheduler.state.budget()["scratch"] == 4.0


def test_a_first_reading_while_an_adopted_model_starts_does_not_count_on_its_share() -> None:
    world = world_of(needing("a", 3.0), needing("b", 3.0), needing("c", 1.0))
    world.units[unit("a")] = Unit(Phase.STARTING)
    world.post(Observed(unit("a"), Phase.STARTING, 0, "d1"))
    world.post(Gauged("scratch", 4.0))
    world.arrive("b")
    world.arrive("c")
    assert started(world) == ["c"], "a may not have taken its 3 of the 4 yet"
    world.complete(unit("c"))
    world.units[unit("a")].phase = Phase.READY
    world.post(Observed(unit("a"), Phase.READY, 0, "d1"))
    world.post(Gauged("scratch", 3.0))
    assert started(world) == ["c", "b"]


def test_nothing_is_too_large_for_what_a_command_tells_but_the_refusal_names_it() -> None:
    world = world_of(needing("a", 18 * GIB), needing("b", 7.0))
    world.post(Gauged("scratch", 2.0))
    small, large = world.arrive("b"), world.arrive("a")
    assert not world.refused
    world.pass_time(601)
    assert world.refused[small].why is world.refused[large].why is Refusal.WAITED_TOO_LONG
    limit = "did not become ready within 10 min (gateway.wait_limit)"
    assert world.refused[small].message == f"b {limit}: it needs 7 of scratch, of which 2 is free"
    assert world.refused[large].message == f"a {limit}: it needs 18.0 GiB of scratch, of which 0.0 GiB is free"


def test_who_waits_for_something_else_is_not_told_of_resources() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    stream = world.arrive("a")
    world.complete(UnitName("a", Placement((0,))))
    waiter = world.arrive("b")
    world.pass_time(601)
    assert stream in world.admitted
    assert world.refused[waiter].message == "b did not become ready within 10 min (gateway.wait_limit)"


def test_a_changed_command_is_asked_before_the_old_answer_counts_again() -> None:
    world = world_of(needing("a", 1.0))
    world.post(Gauged("scratch", 5.0))
    other = Config(*world.config)._replace(resources=Resources(commands={"scratch": Gauge(("other",))}))
    world.post(Reconfigured(other, {"a": "d1"}, 64 * GIB))
    world.arrive("a")
    assert started(world) == []
    world.post(Reconfigured(other, {"a": "d1"}, 64 * GIB))
    world.post(Gauged("scratch", 1.0))
    world.post(Reconfigured(other, {"a": "d1"}, 64 * GIB))
    assert started(world) == ["a"]
    assert world.scheduler.state.gauged == {"scratch": 1.0}


@pytest.mark.parametrize(("free_gib", "starts"), [(7, []), (8, ["a"])])
def test_ram_is_what_the_host_has_left(free_gib: int, starts: list[str]) -> None:
    world = world_of(alone("a", ram_bytes=8 * GIB), resources=Resources())
    world.post(Gauged("ram", free_gib * GIB))
    world.arrive("a")
    assert started(world) == starts


def test_ram_is_never_more_than_the_host_has() -> None:
    """A model that declares more than it takes does not make memory."""
    world = world_of(alone("a", ram_bytes=40 * GIB), alone("b", ram_bytes=40 * GIB), resources=Resources())
    serve(world, "a")
    world.post(Gauged("ram", 60 * GIB))
    assert world.scheduler.state.budget()["ram"] == 64 * GIB
    refused = world.arrive("b")
    assert started(world) == ["a"]
    world.cancel(refused)


def test_more_ram_than_the_host_can_give_is_refused_at_once() -> None:
    world = world_of(alone("a", ram_bytes=65 * GIB), resources=Resources())
    refused = world.arrive("a")
    assert world.refused[refused].message == "a can never fit: it needs 65.0 GiB of ram, and there is 64.0 GiB"


def test_a_size_of_ram_is_taken_at_its_word() -> None:
    world = world_of(alone("a", ram_bytes=8 * GIB), resources=Resources())
    world.post(Gauged("ram", 1 * GIB))
    world.post(Reconfigured(world.config._replace(resources=Resources(ram_bytes=9 * GIB)), {"a": "d1"}, 64 * GIB))
    world.arrive("a")
    assert started(world) == ["a"]


def test_who_sleeps_at_level_1_needs_room_in_the_hosts_memory_as_it_is() -> None:
    """With 64 GiB in the host, of which others use all but 4, the weights of 14 GiB have no place: it stops."""
    on_gpu = UnitName("a", Placement((0,)))
    for free_gib, action in ((4, Stop), (40, Sleep)):
        world = World(config_of(sim("a", 14), sim("b", 16)), 24)
        request = world.arrive("a")
        world.complete(on_gpu)
        world.finish(request)
        world.post(Gauged("ram", free_gib * GIB))
        world.pass_time(11)
        world.arrive("b")
        assert isinstance(world.pending[on_gpu], action)


STEPS = st.tuples(st.sampled_from(["arrive", "finish", "complete", "gauge", "wait"]), st.integers(0, 3), st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    needs=st.tuples(*(st.integers(0, 5).map(float) for _ in NAMES)),
    total=st.integers(0, 12),
    steps=st.lists(STEPS, max_size=60),
)
def test_a_real_resource_is_never_overdrawn(needs: tuple[float, ...], total: int, steps: list[tuple[str, int, bool]]) -> None:
    """Units take their share at some time while they start and give it back when they have stopped; readings tell the truth."""
    world = world_of(*(needing(name, need) for name, need in zip(NAMES, needs, strict=True)), max_wait_s=20.0)
    share = dict(zip(NAMES, needs, strict=True))

    def taken(*, starters: bool) -> float:
        return sum(share[name.id] for name, u in world.units.items() if starters or u.phase is not Phase.STARTING)

    for what, which, flag in steps:
        match what:
            case "arrive":
                world.arrive(NAMES[which])
            case "finish" if world.admitted:
                world.finish(sorted(world.admitted)[which % len(world.admitted)])
            case "complete" if world.pending:
                world.complete(sorted(world.pending)[which % len(world.pending)])
            case "gauge":
                world.post(Gauged("scratch", total - taken(starters=flag)))
            case "wait":
                world.pass_time(7.0 * which)
        assert taken(starters=True) <= total
