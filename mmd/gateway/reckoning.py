"""What a model is reckoned with, and where that comes from: the arithmetic that `mmdctl show` prints."""

from mmd.config import EngineKind, Model
from mmd.engines import engine
from mmd.names import Placement
from mmd.policy.ledger import RAM, asleep_amounts, awake_amounts
from mmd.policy.lesson import Lesson
from mmd.policy.state import State
from mmd.sizes import BYTES_PER_WEIGHT, estimate_of
from mmd.status import EstimateStatus, Reckoning, SleepStatus

__all__ = ["reckoning"]


def reckoning(state: State, model: Model) -> Reckoning | None:
    """None of a server that mmd does not start."""
    if model.engine is EngineKind.EXTERNAL:
        return None
    lesson = state.lesson_of(model.name)
    return Reckoning(
        vram_bytes=state.vram_of(model),
        start_s=lesson.starts_in_s,
        start_learned=lesson.start_s is not None,
        declared_bytes=model.vram_bytes,
        estimate=_estimate(model),
        measured_bytes=lesson.peak_bytes or None,
        raised_bytes=lesson.raised_bytes or None,
        asleep=_asleep(state, model, lesson),
    )


def _estimate(model: Model) -> EstimateStatus | None:
    found = estimate_of(model)
    if found is None or model.vram_bytes is not None or model.gpu_count == 0:
        return None
    return EstimateStatus(
        params=found.params,
        precision=found.precision,
        bytes_per_weight=BYTES_PER_WEIGHT[found.precision],
        gpus=found.gpus,
        weights_bytes=found.weights_bytes,
        kv_cache_bytes=found.kv_cache_bytes,
        overhead_bytes=found.overhead_bytes,
        total_bytes=found.total_bytes,
    )


def _asleep(state: State, model: Model, lesson: Lesson) -> tuple[SleepStatus, ...]:
    if not engine(model.engine).can_sleep or model.gpu_count == 0:
        return ()
    anywhere, vram_bytes = Placement(tuple(range(model.gpu_count))), state.vram_of(model)
    awake = awake_amounts(model, anywhere, vram_bytes)

    def at(level: int) -> SleepStatus:
        measured = lesson.held_bytes.get(level)
        asleep = asleep_amounts(model, anywhere, vram_bytes, level, held_bytes=measured)
        return SleepStatus(
            level=level,
            held_bytes=int(asleep[0]),
            measured=measured is not None,
            host_bytes=int(asleep.get(RAM, 0) - awake.get(RAM, 0)),
            wake_s=lesson.wakes_in_s(level),
            wake_learned=(lesson.wake_s if level == 1 else lesson.reload_s) is not None,
        )

    return tuple(at(level) for level in sorted({*range(1, model.sleep_level + 1), *lesson.held_bytes}))
