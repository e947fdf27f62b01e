"""GPUs as they come and go: slices of divided ones, before anything is known of them, and when they cannot be read."""

import pytest
from world import GIB, World, config_of, sim

from mmd.config import EngineKind, Model
from mmd.names import Placement, UnitName
from mmd.policy.actions import Refusal, Start
from mmd.policy.events import Arrived, GpuSample, Reconfigured, Sampled
from mmd.policy.scheduler import Scheduler

WHOLE = (GpuSample(1, 80 * GIB, 0, "GPU-bb"), GpuSample(2, 80 * GIB, 0, "GPU-cc"))
SLICES = (GpuSample(100, 20 * GIB, 0, "MIG-a0", "GPU-aa"), GpuSample(102, 10 * GIB, 0, "MIG-a2", "GPU-aa"))


def placements(gpus: int | tuple[int | str, ...], *there: GpuSample) -> list[str]:
    scheduler = Scheduler()
    scheduler.handle(Sampled(there), 0.0)
    model = Model(name="m", id="m", engine=EngineKind.COMMAND, gpus=gpus, vram_bytes=GIB)
    return [str(placement) for placement in scheduler.state.placements(model)]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1, ["1", "2", "100", "102"]),
        (2, ["1-2"]),
        (3, []),
        ((102,), ["102"]),
        (("MIG-a0",), ["100"]),
        ((0,), ["100", "102"]),
        (("GPU-aa",), ["100", "102"]),
        ((2, "GPU-bb"), ["1-2"]),
        ((1, "GPU-bb"), []),
        ((100, 102), []),
        ((0, 1), []),
        ((101,), []),
    ],
)
def test_where_a_model_may_go(gpus: int | tuple[int | str, ...], expected: list[str]) -> None:
    assert placements(gpus, *WHOLE, *SLICES) == expected


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ((), "this machine has none"),
        (WHOLE[:1], "this machine has 1"),
        (SLICES, "this machine has 2 slices of divided GPUs (MIG), of which a process can use no more than one"),
        ((WHOLE[0], SLICES[0]), "has 1 and 1 slice of divided GPUs (MIG), of which a process can use no more than one"),
    ],
)
def test_two_gpus_where_there_are_none(there: tuple[GpuSample, ...], words: str) -> None:
    world = World(config_of(sim("m", 6, gpus=2)))
    world.post(Sampled(there))
    refusal = world.refused[world.arrive("m")]
    assert refusal.why is Refusal.NEVER_FITS
    assert refusal.message.startswith("m needs 2 GPUs, and ")
    assert words in refusal.message


def test_models_share_the_slices_by_their_memory() -> None:
    config = config_of(sim("large", 18), sim("small", 8), sim("other", 8))
    world = World(config)
    world.post(Sampled(SLICES))
    world.total = dict.fromkeys((100, 102), 20 * GIB)  # type: ignore[assignment]
    world.arrive("small")
    world.arrive("large")
    started = [action.unit for action in world.actions if isinstance(action, Start)]
    assert started == [UnitName("small", Placement((102,))), UnitName("large", Placement((100,)))]


def test_until_the_gpus_have_been_looked_at_a_model_waits() -> None:
    config = config_of(sim("m", 6))
    scheduler = Scheduler()
    scheduler.handle(Reconfigured(config, {"m": "d1"}, 64 * GIB), 0.0)
    assert scheduler.handle(Arrived(1, "m"), 1.0) == []
    assert scheduler.handle(Sampled((GpuSample(0, 24 * GIB, 0),)), 2.0) == [Start(UnitName("m", Placement((0,))))]


def test_whoever_waited_for_a_first_look_is_told_when_it_fails() -> None:
    scheduler = Scheduler()
    scheduler.handle(Reconfigured(config_of(sim("m", 6)), {"m": "d1"}, 64 * GIB), 0.0)
    scheduler.handle(Arrived(1, "m"), 1.0)
    (refusal,) = scheduler.handle(Sampled((), "the driver is gone"), 2.0)
    assert "the GPUs cannot be read: the driver is gone" in str(refusal)


def test_when_the_gpus_cannot_be_read_any_longer_what_was_known_of_them_counts() -> None:
    world = World(config_of(sim("m", 6), sim("large", 20)), 24)
    world.post(Sampled((GpuSample(0, 24 * GIB, 10 * GIB),)))
    world.post(Sampled((), "the driver is gone"))
    state = world.scheduler.state
    assert state.budget()[0] == 13 * GIB, "foreign use is still counted"
    world.arrive("m")
    assert UnitName("m", Placement((0,))) in world.pending
    waiting = world.arrive("large")
    assert waiting in world.waiting, "it does not fit beside the foreign use, but that may go"
    world.post(Sampled((GpuSample(0, 24 * GIB, 16 * GIB),)))
    assert state.foreign[0] == 10 * GIB, "a start is under way"
    world.complete(UnitName("m", Placement((0,))))
    world.post(Sampled((GpuSample(0, 24 * GIB, 6 * GIB),)))
    assert state.budget()[0] == 23 * GIB
