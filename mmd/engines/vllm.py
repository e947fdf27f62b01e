"""vLLM: `python -m vllm.entrypoints.openai.api_server` on a Unix socket, with its sleep API.

The module is started with the environment's own Python, not by the `vllm` console script: the CPU build ships no such script,
and what it would run (`vllm.entrypoints.cli.main`) fails there with a circular import, whereas this module works in every
build. It takes the same options as `vllm serve`.
"""

import re
from collections.abc import Mapping

from mmd.config import Model
from mmd.engines.base import CommandContext, HttpCall, ProgressPattern
from mmd.sizes import OVERHEAD_BYTES, estimate_of

__all__ = ["ENGINE", "Vllm"]

_MODULE = "vllm.entrypoints.openai.api_server"

_PROGRESS = (
    (r"non-default args", "reading the model's configuration"),
    (r"Resolved architecture: (\w+)", "starting the engine for {0}"),
    (r"Initializing a V\d LLM engine", "starting the workers"),
    (r"Loading (?:safetensors|pt).*?:\s+(\d+)%", "loading weights {0} %"),
    (r"Loading .*?(?:Streamer|loader).*?:\s+(\d+)%", "loading weights {0} %"),
    (r"Starting to load model", "loading weights"),
    (r"Loading weights took", "weights loaded"),
    (r"Model loading took ([\d.]+) GiB", "weights loaded, {0} GiB"),
    (r"Compiling a graph|Dynamo bytecode transform", "compiling"),
    (r"torch\.compile took ([\d.]+) s", "compiled in {0} s"),
    (r"Available KV cache memory: ([\d.]+) GiB", "KV cache {0} GiB"),
    (r"[CG]PU KV cache size: ([\d,]+) tokens", "KV cache {0} tokens"),
    (r"Capturing CUDA graphs.*?:\s+(\d+)%", "capturing CUDA graphs {0} %"),
    (r"Graph capturing finished", "CUDA graphs captured"),
    (r"init engine .* took", "engine initialised"),
    (r"Application startup complete", "serving"),
)
"""vLLM 0.32's start-up log, in its order: a regular expression and the status that it stands for."""

_OUT_OF_MEMORY = (
    r"CUDA out of memory|HIP out of memory|OutOfMemoryError|CUDA error: out of memory|"
    r"Free memory on device .* is less than desired|No available memory for the cache blocks"
)
"""PyTorch's errors, and vLLM's two own: the free-memory check before loading and an empty KV cache after it."""

_IS_SLEEPING = HttpCall("GET", "/is_sleeping", timeout_s=5.0)

_GIB = 1 << 30

_KV_CACHE_MIN_BYTES = _GIB // 4
"""Below this the estimate says more about its own error than about the cache: vLLM had better measure."""

_CPU_KV_CACHE_GIB = 4

_MEMORY_OPTIONS = ("--gpu-memory-utilization", "--device-memory-utilization", "--kv-cache-memory-bytes")

_RESIDUAL_BYTES = int(1.2 * _GIB)
"""Asleep on one GPU: CUDA context, graphs and what the sleeping allocator does not manage (1.1 to 1.2 GiB reported)."""

_RESIDUAL_PER_PEER_BYTES = int(0.8 * _GIB)
"""More for each further GPU of a tensor parallel group (7 GB reported for eight)."""


class Vllm:
    """See `mmd.engines.base.Engine`."""

    __slots__ = ()

    uses_socket: bool = True
    can_sleep: bool = True
    sleeping: HttpCall | None = _IS_SLEEPING

    @property
    def progress(self) -> tuple[ProgressPattern, ...]:
        """Compiled here: the runner needs it, every daemon-reload would pay for it."""
        return tuple(ProgressPattern(re.compile(pattern), text) for pattern, text in _PROGRESS)

    @property
    def out_of_memory(self) -> re.Pattern[str] | None:
        return re.compile(_OUT_OF_MEMORY)

    def command(self, model: Model, context: CommandContext) -> tuple[str, ...]:
        """The user's `args` come last: of an option given twice vLLM's argparse takes the last one, and every switch has its
        opposite (`--no-enable-sleep-mode`)."""
        python = str(model.venv / "bin" / "python") if model.venv else "python3"
        return (
            *(python, "-m", _MODULE),
            *("--model", model.model or model.name),
            *("--uds", context.socket),
            *("--served-model-name", model.name),
            "--disable-uvicorn-access-log",  # a line for each of our health checks, for ever; see gateway.request_log
            *(("--tensor-parallel-size", str(model.gpu_count)) if model.gpu_count > 1 else ()),
            *(("--enable-sleep-mode",) if model.sleep_level and model.gpu_count else ()),
            *_adapter_arguments(model),
            *_memory_arguments(model),
            *model.args,
        )

    def environment(self, model: Model, context: CommandContext) -> Mapping[str, str]:
        """Caches inside the unit's own directory, the control API, and nothing sent to anybody."""
        return {
            "HOME": context.cache_dir,
            "XDG_CACHE_HOME": context.cache_dir,
            "VLLM_CACHE_ROOT": f"{context.cache_dir}/vllm",
            "VLLM_SERVER_DEV_MODE": "1",  # /sleep, /wake_up, /is_sleeping, /collective_rpc; the CPU build has them as well
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",  # longer than the gateway keeps an idle connection; vLLM's 5 s is shorter
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",  # no module from the working directory, which an engine may write
            **_cpu_memory_environment(model),
        }

    def warm_up(self, model: str) -> HttpCall | None:
        return HttpCall("POST", "/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 1}, timeout_s=120.0)

    def sleep(self, level: int) -> tuple[HttpCall, ...]:
        """The gateway has drained the engine, so all three modes do the same, unless it was wrong. Then `wait` would answer too
        late and sleep after all, behind our back; `keep` would freeze a client for hours; `abort` ends the stray request at
        once, visibly (finish_reason `abort`), and the sleep is bounded."""
        return (HttpCall("POST", f"/sleep?level={level}&mode=abort", timeout_s=120.0),)

    def wake(self, level: int) -> tuple[HttpCall, ...]:
        """Level 2 has discarded the weights: a bare /wake_up would answer "awake" and then serve garbage (vllm#29341)."""
        if level == 1:
            return (HttpCall("POST", "/wake_up", timeout_s=120.0),)
        return (
            HttpCall("POST", "/wake_up?tags=weights", timeout_s=120.0),
            HttpCall("POST", "/collective_rpc", {"method": "reload_weights"}, timeout_s=600.0),
            HttpCall("POST", "/wake_up?tags=kv_cache", timeout_s=120.0),
        )

    def residual_bytes(self, model: Model, level: int) -> int:
        """The same for both levels: level 2 saves host memory, not GPU memory."""
        if model.gpu_count == 0:
            return 0
        residual = _RESIDUAL_BYTES + _RESIDUAL_PER_PEER_BYTES * (model.gpu_count - 1)
        return residual if model.vram_bytes is None else min(residual, model.vram_bytes)

    def host_bytes(self, model: Model, level: int) -> int:
        """Level 1 keeps a copy of the weights; where they are not known, no more than all of its GPU memory. Some releases were
        seen to take up to twice that (vllm#16663), which `ram: auto` then finds in use."""
        if level != 1 or model.gpu_count == 0:
            return 0
        made_of = estimate_of(model)
        return ((model.vram_bytes or 0) if made_of is None else made_of.weights_bytes) * model.gpu_count


def _adapter_arguments(model: Model) -> tuple[str, ...]:
    """LoRA adapters by the names that clients send; their rank is looked up by vLLM up to --max-lora-rank (16), see `args`."""
    if not model.lora:
        return ()
    return ("--enable-lora", "--lora-modules", *(f"{name}={path}" for name, path in model.lora.items()))


def _memory_arguments(model: Model) -> tuple[str, ...]:
    """How much GPU memory vLLM may take; nothing on the CPU, without `vram`, or when the user's `args` say it.

    `--gpu-memory-utilization` is a fraction of the GPU's total memory, known when the unit runs (`{vram_fraction}`). It bounds
    everything, and vLLM refuses to start unless that much is free. On its own vLLM profiles a forward pass and gives the KV
    cache what is left under the bound, which goes wrong when another engine's memory changes meanwhile. So, where `params` tell
    the weights, the KV cache gets a fixed size: what weights and overhead (mmd.sizes) leave of `vram`.
    """
    if model.vram_bytes is None or model.gpu_count == 0:
        return ()
    if _given(model.args, *_MEMORY_OPTIONS):
        return ()
    kv_cache = _kv_cache_bytes(model)
    return (
        *("--gpu-memory-utilization", "{vram_fraction}"),
        *(("--kv-cache-memory-bytes", str(kv_cache)) if kv_cache >= _KV_CACHE_MIN_BYTES else ()),
    )


def _kv_cache_bytes(model: Model) -> int:
    """Per GPU, 0 when it cannot be told."""
    made_of = estimate_of(model)
    if model.vram_bytes is None or made_of is None:
        return 0
    return max(0, model.vram_bytes - made_of.weights_bytes - made_of.overhead_bytes)


def _cpu_memory_environment(model: Model) -> Mapping[str, str]:
    """The KV cache of a model on the CPU, in whole GiB; nothing when the user's `args` say it.

    Left alone vLLM takes 92 % of the host's memory. So the cache gets what weights and overhead leave of `ram`; half of what
    the overhead leaves where the weights are not known; 4 GiB, once vLLM's own default, without `ram`.
    """
    if model.gpu_count or _given(model.args, *_MEMORY_OPTIONS):
        return {}
    made_of = estimate_of(model)
    if made_of is None:
        kv_cache = (model.ram_bytes - OVERHEAD_BYTES) // 2  # overhead here: vLLM's three processes, 0.5 GiB each
    else:
        kv_cache = model.ram_bytes - made_of.weights_bytes - made_of.overhead_bytes
    space = kv_cache // _GIB if model.ram_bytes else _CPU_KV_CACHE_GIB
    return {"VLLM_CPU_KVCACHE_SPACE": str(max(1, space))}


def _given(args: tuple[str, ...], *options: str) -> bool:
    """Whether `args` has one of the options, in any spelling that vLLM takes: `--a-b V`, `--a-b=V`, `--a_b V`."""
    return any(arg.split("=", 1)[0].replace("_", "-") in options for arg in args if arg.startswith("--"))


ENGINE = Vllm()
