"""What a model is reckoned with, as arithmetic that a person can check: part of `mmdctl show`."""

from collections.abc import Iterator

from mmd.quantity import format_count, human_duration, human_size
from mmd.status import EstimateStatus, Reckoning, SleepStatus

__all__ = ["facts"]


def facts(reckoning: Reckoning) -> Iterator[tuple[str, str]]:
    """Titles and lines: where its memory comes from, per GPU; what it holds asleep; how long it takes to come."""
    sources = list(_sources(reckoning))
    if len(sources) > 1:
        title, words = sources.pop()
        sources.append((title, f"{words}, so {_reserved(reckoning)} is reserved"))
    yield from sources
    yield "Start", _seconds(reckoning.start_s, reckoning.start_learned)
    for asleep in reckoning.asleep:
        yield "Asleep", _asleep(asleep)


def _sources(reckoning: Reckoning) -> Iterator[tuple[str, str]]:
    if reckoning.declared_bytes is not None:
        yield "Declared", human_size(reckoning.declared_bytes)
    if reckoning.estimate is not None:
        yield "Estimated", _estimate(reckoning.estimate)
    if reckoning.measured_bytes is not None:
        yield "Measured", f"{human_size(reckoning.measured_bytes)} at most"
    if reckoning.raised_bytes is not None:
        yield "Raised", f"to {human_size(reckoning.raised_bytes)} after it ran out of memory"


def _reserved(reckoning: Reckoning) -> str:
    declared = reckoning.declared_bytes or 0
    seen = max(reckoning.measured_bytes or 0, reckoning.raised_bytes or 0)
    size = human_size(reckoning.vram_bytes)
    return f"the declared {size}" if declared > seen else size


def _estimate(estimate: EstimateStatus) -> str:
    """`7.6 B x 2 bytes (bf16) = 14.2 GiB weights + 2.8 GiB KV cache + 2.4 GiB overhead = 19.4 GiB`"""
    count = format_count(estimate.params)
    each = f"{estimate.bytes_per_weight:g} byte{'' if estimate.bytes_per_weight == 1 else 's'}"
    shared = f" / {estimate.gpus} GPUs" if estimate.gpus > 1 else ""
    return (
        f"{count[:-1]} {count[-1]} x {each} ({estimate.precision}){shared} = {human_size(estimate.weights_bytes)} weights + "
        f"{human_size(estimate.kv_cache_bytes)} KV cache + {human_size(estimate.overhead_bytes)} overhead = "
        f"{human_size(estimate.total_bytes)}"
    )


def _asleep(asleep: SleepStatus) -> str:
    held = f"{human_size(asleep.held_bytes)} ({'measured' if asleep.measured else 'guessed'}) at level {asleep.level}"
    host = f", and {human_size(asleep.host_bytes)} of host memory" if asleep.host_bytes else ""
    return f"{held}{host}; awake in {_seconds(asleep.wake_s, asleep.wake_learned)}"


def _seconds(time_s: float, learned: bool) -> str:
    return f"{human_duration(time_s)} ({'learned' if learned else 'guessed'})"
