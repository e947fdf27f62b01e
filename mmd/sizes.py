"""GPU memory of a model that does not declare it: an estimate from its parameters and precision, until it is measured.

weights = parameters x bytes per weight / GPUs
KV cache = 20 % of the weights, at least 1 GiB
overhead = 1.5 GiB (CUDA context, captured graphs, NCCL buffers) + 6 % of the weights (activations, quantisation scales,
embeddings kept in higher precision)

Where the memory is declared, the KV cache is what weights and overhead leave of it (engines.vllm).
"""

from collections.abc import Mapping
from typing import NamedTuple

from mmd.config import EngineKind, Model

__all__ = [
    "BYTES_PER_WEIGHT",
    "DEFAULT_PRECISION",
    "OVERHEAD_BYTES",
    "Estimate",
    "estimate",
    "estimate_of",
    "sized",
    "vram_bytes",
]

BYTES_PER_WEIGHT: Mapping[str, float] = {
    "fp32": 4.0,
    "float32": 4.0,
    "bf16": 2.0,
    "bfloat16": 2.0,
    "fp16": 2.0,
    "float16": 2.0,
    "half": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "awq": 0.5,
    "gptq": 0.5,
    "fp4": 0.5,
    "nvfp4": 0.5,
    "mxfp4": 0.5,
}
"""By `precision`. Scales and the layers that stay in 16 bits are within the overhead."""

DEFAULT_PRECISION = "bf16"

_GIB = 1 << 30
OVERHEAD_BYTES = 3 * _GIB // 2
_OVERHEAD_SHARE = 0.06
_KV_CACHE_SHARE = 0.2
_KV_CACHE_MIN_BYTES = _GIB


class Estimate(NamedTuple):
    """What a model is made of, per GPU, with what that was reckoned from.

    The parts are whole tenths of a GiB, so that they add up as they are shown; an estimate that is finer only looks exact.
    """

    params: float
    precision: str
    gpus: int
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.overhead_bytes


def estimate(params: float, precision: str = DEFAULT_PRECISION, gpus: int = 1) -> Estimate:
    """What `params` weights in `precision` take on each of `gpus` GPUs."""
    weights = _rounded(params * BYTES_PER_WEIGHT[precision] / gpus)
    kv_cache = max(_KV_CACHE_MIN_BYTES, _rounded(_KV_CACHE_SHARE * weights))
    return Estimate(params, precision, gpus, weights, kv_cache, _rounded(OVERHEAD_BYTES + _OVERHEAD_SHARE * weights))


def _rounded(size_bytes: float) -> int:
    return round(size_bytes * 10 / _GIB) * _GIB // 10


def estimate_of(model: Model) -> Estimate | None:
    """What the model is made of, by its parameters; None when it does not tell them. On the CPU: as on one GPU."""
    if model.params is None:
        return None
    return estimate(model.params, model.precision or DEFAULT_PRECISION, max(1, model.gpu_count))


def vram_bytes(model: Model) -> int:
    """What the model needs on each of its GPUs: as declared, else estimated; 0 when it uses none."""
    if model.gpu_count == 0 or model.engine is EngineKind.EXTERNAL:
        return 0
    if model.vram_bytes is not None:
        return model.vram_bytes
    found = estimate_of(model)
    return 0 if found is None else found.total_bytes


def sized(model: Model) -> Model:
    """The model with its memory filled in, so that its engine keeps to what is reserved for it."""
    return model if model.vram_bytes is not None else model._replace(vram_bytes=vram_bytes(model) or None)
