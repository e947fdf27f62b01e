"""How deep victims go down: level 1, level 2, stop, as GPU and host memory require (scheduling.md, 5)."""

from collections.abc import Iterable
from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy_scenarios import last, serve, unit
from world import GIB, World, config_of, sim

from mmd.config import Evict, Idle
from mmd.names import Placement, UnitName
from mmd.policy.actions import Sleep, Start, Stop, Wake
from mmd.policy.events import Phase
from mmd.policy.eviction import Candidate, Option, choose_victims
from mmd.policy.ledger import RAM, Key, covers, plus


def swap(world: World, model: str) -> list[object]:
    """Ask for a model and let everything end well; the actions on units that this took."""
    before = len(world.actions)
    world.pass_time(11)
    serve(world, model)
    return [action for action in world.actions[before:] if isinstance(action, Sleep | Start | Stop | Wake)]


def test_a_victim_sleeps_at_level_1_as_long_as_host_memory_allows() -> None:
    world = World(
        config_of(sim("a", 16, sleep_level=2), sim("b", 16, sleep_level=2), sim("c", 16, sleep_level=2)), 24, ram_gib=20
    )
    serve(world, "a")
    asleep = swap(world, "b")[0]
    assert isinstance(asleep, Sleep)
    assert asleep.level == 1
    asleep = swap(world, "c")[0]
    assert isinstance(asleep, Sleep)
    assert (asleep.unit, asleep.level) == (unit("b"), 2), "a's weights are in the host's memory, there is no room for b's"


def test_a_victim_that_may_not_go_deeper_stops_when_the_host_is_full() -> None:
    world = World(config_of(sim("a", 16), sim("b", 16)), 24, ram_gib=8)
    serve(world, "a")
    assert swap(world, "b") == [Stop(unit("a")), Start(unit("b"))]


def test_an_old_sleeper_stops_so_that_a_model_in_demand_may_sleep() -> None:
    world = World(config_of(sim("a", 16), sim("b", 16), sim("c", 16)), 24, ram_gib=20)
    serve(world, "a")
    swap(world, "b")
    world.pass_time(2000)
    for _ in range(50):
        world.finish(world.arrive("b"))
    taken = swap(world, "c")
    assert taken == [Stop(unit("a")), Sleep(unit("b"), 1, int(0.05 * 16 * GIB)), Start(unit("c"))]


def test_lru_stops_the_sleeper_that_was_used_longest_ago() -> None:
    config = config_of(sim("a", 16), sim("b", 16), sim("c", 16))
    world = World(config._replace(policy=config.policy._replace(evict=Evict.LRU)), 24, ram_gib=20)
    serve(world, "a")
    swap(world, "b")
    assert swap(world, "c")[0] == Stop(unit("a"))


def test_an_idle_model_goes_deeper_or_stays_when_the_host_is_full() -> None:
    idle = Idle(sleep_after_s=30)
    world = World(config_of(sim("a", 9, idle=idle, sleep_level=2), sim("b", 9, idle=idle)), 24, ram_gib=8)
    serve(world, "a")
    serve(world, "b")
    world.pass_time(31)
    assert last(world) == Sleep(unit("a"), 2, int(0.02 * 9 * GIB))
    world.complete(unit("a"))
    world.pass_time(60)
    assert world.units[unit("b")].phase is Phase.READY, "stopping it is not what idle.sleep_after asks for"


def test_an_operators_sleep_goes_deeper_where_the_host_is_full() -> None:
    world = World(config_of(sim("a", 9, sleep_level=2), sim("b", 9)), 24, ram_gib=4)
    serve(world, "a")
    serve(world, "b")
    world.release(unit("a"), 1)
    assert last(world) == Sleep(unit("a"), 2, int(0.02 * 9 * GIB))
    world.complete(unit("a"))
    world.release(unit("b"), 1)
    assert last(world) == Stop(unit("b")), "level 1 is all that it permits"


def test_a_sleep_waits_for_host_memory_that_is_about_to_come_free() -> None:
    """Found by storm 30: a sleeper was on its way out, and its host memory was given away before it had gone."""
    world = World(config_of(sim("a", 14), sim("e", 12)), 24, 24, ram_gib=16)
    serve(world, "a")
    where = serve(world, "e")
    world.release(where, 1)
    world.complete(where)
    world.release(where, 0)
    assert last(world) == Stop(where)
    world.release(unit("a"), 1)
    assert last(world) == Stop(where)
    world.complete(where)
    assert last(world) == Sleep(unit("a"), 1, int(0.05 * 14 * GIB))


def test_an_instance_whose_sleeps_leave_more_each_time_is_started_anew() -> None:
    world = World(config_of(sim("a", 14), sim("b", 16)), 24)
    where = serve(world, "a")
    for held_gib in (0.5, 0.75, 0.9):
        world.release(where, 1)
        world.complete(where, held_bytes=int(held_gib * GIB))
        assert world.units[where].phase is Phase.SLEEPING
        serve(world, "a")
    world.release(where, 1)
    world.complete(where, held_bytes=int(1.3 * GIB))
    assert last(world) == Stop(where), "0.8 GiB more than its first sleep left"
    world.complete(where)
    world.arrive("a")
    assert last(world) == Start(where)


_GIBS = st.integers(0, 8)


def _options(index: int, draw: tuple[int, int, int, int]) -> Candidate:
    """A resident that holds `draw[0]` GiB of the GPU and may sleep, or (0) a sleeper that holds host memory."""
    gpu, ram, rate, used = draw
    where = UnitName(f"m{index}", Placement((0,)))
    if not gpu:
        return Candidate(where, used, (Option(0, {0: 0.5, RAM: ram}, rate),))
    asleep = Option(1, {0: gpu - 0.5, RAM: -float(gpu)}, rate)
    deeper = Option(2, {0: gpu - 0.25}, rate * 3)
    return Candidate(where, used, (asleep, deeper, Option(0, {0: gpu}, rate * 10)))


@settings(max_examples=300, deadline=None)
@given(
    drawn=st.lists(st.tuples(_GIBS, _GIBS, st.integers(0, 5), st.integers(0, 5)), max_size=5),
    need=st.integers(1, 20),
    free=st.integers(0, 6),
    ram=st.integers(-2, 12),
)
def test_the_chosen_set_is_the_best_there_is(drawn: list[tuple[int, int, int, int]], need: int, free: int, ram: int) -> None:
    candidates = [_options(index, each) for index, each in enumerate(drawn)]
    room: dict[Key, float] = {0: float(free), RAM: float(ram)}
    chosen = choose_victims(candidates, {0: float(need)}, room, Evict.MIN_LOSS)
    losses = [
        sum(option.loss for option in options)
        for size in range(len(candidates) + 1)
        for members in combinations(candidates, size)
        for options in product(*(member.options for member in members))
        if _fits(options, need, room)
    ]
    if chosen is None:
        assert not losses
        return
    by_unit = {candidate.unit: candidate for candidate in candidates}
    taken = [next(o for o in by_unit[where].options if o.level == level) for where, level in chosen.items()]
    assert _fits(taken, need, room)
    assert sum(option.loss for option in taken) == min(losses)


def _fits(options: Iterable[Option], need: int, room: dict[Key, float]) -> bool:
    freed = plus(option.freed for option in options)
    takes_ram = freed.get(RAM, 0) < 0
    short = max(0.0, room[RAM]) + freed.get(RAM, 0) < 0
    return covers({0: room[0] + freed.get(0, 0)}, {0: float(need)}) and not (takes_ram and short)


@given(
    drawn=st.lists(st.tuples(_GIBS, _GIBS, st.integers(0, 5), st.integers(0, 5)), max_size=16),
    need=st.integers(1, 40),
    ram=st.integers(0, 30),
    evict=st.sampled_from(Evict),
    thorough=st.booleans(),
)
def test_whatever_is_chosen_makes_room(
    drawn: list[tuple[int, int, int, int]], need: int, ram: int, evict: Evict, thorough: bool
) -> None:
    candidates = [_options(index, each) for index, each in enumerate(drawn)]
    room: dict[Key, float] = {0: 0.0, RAM: float(ram)}
    chosen = choose_victims(candidates, {0: float(need)}, room, evict, thorough=thorough)
    if chosen is None:
        assert sum(candidate.options[-1].freed.get(0, 0) for candidate in candidates) < need, "stopping all of them would do"
        return
    by_unit = {candidate.unit: candidate for candidate in candidates}
    assert _fits([next(o for o in by_unit[w].options if o.level == level) for w, level in chosen.items()], need, room)
