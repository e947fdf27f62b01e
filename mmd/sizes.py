"""GPU memory of a model that does not declare it: an estimate from its parameters and precision, until it is measured.

weights = parameters x bytes per weight / GPUs
KV cache = 20 % of the weights, at least 1 GiB
overhead = 1.5 GiB: CUDA context, captured graphs, activations
"""

from collections.abc import Mapping

from mmd.config import EngineKind, Model

__all__ = ["BYTES_PER_WEIGHT", "DEFAULT_PRECISION", "estimate_vram_bytes", "sized", "vram_bytes"]

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
_KV_CACHE_SHARE = 0.2
_KV_CACHE_MIN_BYTES = _GIB
_OVERHEAD_BYTES = 3 * _GIB // 2
_GRAIN_BYTES = 64 << 20  # finer than this an estimate only looks exact


def estimate_vram_bytes(params: float, precision: str | None = None, gpus: int = 1) -> int:
    """Bytes per GPU for `params` weights in `precision` (default bf16), spread over `gpus` GPUs."""
    weights = params * BYTES_PER_WEIGHT[precision or DEFAULT_PRECISION] / max(1, gpus)
    need = weights + max(_KV_CACHE_MIN_BYTES, _KV_CACHE_SHARE * weights) + _OVERHEAD_BYTES
    return -int(-need // _GRAIN_BYTES) * _GRAIN_BYTES


def vram_bytes(model: Model) -> int:
    """What the model needs on each of its GPUs: as declared, else estimated; 0 when it uses none."""
    if model.gpu_count == 0 or model.engine is EngineKind.EXTERNAL:
        return 0
    if model.vram_bytes is not None:
        return model.vram_bytes
    return 0 if model.params is None else estimate_vram_bytes(model.params, model.precision, model.gpu_count)


def sized(model: Model) -> Model:
    """The model with its memory filled in, so that its engine keeps to what is reserved for it."""
    return model if model.vram_bytes is not None else model._replace(vram_bytes=vram_bytes(model) or None)
