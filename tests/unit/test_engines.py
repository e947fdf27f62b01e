"""The engine descriptions: command lines, sleep and wake sequences, log patterns."""

from pathlib import Path

import pytest

from mmd.config import EngineKind, Model, Sim
from mmd.engines import engine
from mmd.engines.base import CommandContext, Engine
from mmd.errors import MmdError
from mmd.sizes import estimate_of, sized

GIB = 1 << 30
CONTEXT = CommandContext(
    socket="/run/mmd-model/m@%i/engine.sock",
    bin_dir="/usr/lib/mmd/bin",
    cache_dir="/var/cache/mmd/m",
    sim_dir="/run/mmd-sim",
    gpu_memory_bytes={1: 24 * GIB, 0: 24 * GIB},
)


def vllm_model(**changes: object) -> Model:
    base = Model(name="org/m", id="m", engine=EngineKind.VLLM, vram_bytes=18 * GIB, venv=Path("/opt/vllm"))
    return base._replace(**changes)  # type: ignore[arg-type]


def vllm_command(**changes: object) -> tuple[str, ...]:
    return engine(EngineKind.VLLM).command(vllm_model(**changes), CONTEXT)


def option(command: tuple[str, ...], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def status_of(found: Engine, line: str) -> str | None:
    for pattern in found.progress:
        match = pattern.pattern.search(line)
        if match:
            return pattern.text.format(*match.groups())
    return None


@pytest.mark.parametrize("kind", EngineKind)
def test_every_kind_has_an_engine(kind: EngineKind) -> None:
    found = engine(kind)
    assert found.can_sleep == (found.sleeping is not None)
    assert found.can_sleep == (kind in {EngineKind.VLLM, EngineKind.SIM})


def test_vllm_command() -> None:
    command = vllm_command(args=("--enforce-eager",))
    assert command[:3] == ("/opt/vllm/bin/python", "-m", "vllm.entrypoints.openai.api_server")
    assert option(command, "--model") == "org/m"
    assert option(command, "--uds") == CONTEXT.socket
    assert option(command, "--served-model-name") == "org/m"
    assert option(command, "--gpu-memory-utilization") == "{vram_fraction}"
    assert "--enable-sleep-mode" in command
    assert "--tensor-parallel-size" not in command
    assert command[-1] == "--enforce-eager"


def test_vllm_without_a_venv_uses_the_path() -> None:
    assert vllm_command(venv=None)[0] == "python3"


def test_vllm_two_gpus() -> None:
    assert option(vllm_command(gpus=(0, 1)), "--tensor-parallel-size") == "2"


def test_vllm_user_arguments_come_last_and_win() -> None:
    command = vllm_command(args=("--no-enable-sleep-mode",))
    assert command.index("--no-enable-sleep-mode") > command.index("--enable-sleep-mode")


@pytest.mark.parametrize(
    "args",
    [("--gpu-memory-utilization", "0.5"), ("--gpu_memory_utilization=0.5",), ("--kv-cache-memory-bytes", "1")],
)
def test_vllm_memory_arguments_of_the_user_replace_ours(args: tuple[str, ...]) -> None:
    command = vllm_command(args=args, params=7e9, precision="bf16")
    assert command[-len(args) :] == args
    assert "{vram_fraction}" not in command
    assert sum(word.startswith("--kv-cache-memory-bytes") for word in command) == (args[0] == "--kv-cache-memory-bytes")


def test_vllm_kv_cache_is_what_weights_and_overhead_leave() -> None:
    command = vllm_command(params=4 * GIB, precision="bf16")  # weights: 8 GiB
    kv_cache = int(option(command, "--kv-cache-memory-bytes") or 0)
    assert kv_cache == pytest.approx((18 - 8 - 2.0) * GIB, abs=2), "overhead: 1.5 GiB and 6 % of the weights, to a tenth"
    half = vllm_command(params=4 * GIB, precision="bf16", gpus=2)
    assert int(option(half, "--kv-cache-memory-bytes") or 0) == pytest.approx((18 - 4 - 1.7) * GIB, abs=2)


@pytest.mark.parametrize("changes", [{"params": 7.6e9}, {"params": 70e9, "precision": "fp8", "gpus": 2}])
def test_vllm_kv_cache_of_an_estimated_model_is_the_estimate_s(changes: dict[str, object]) -> None:
    model = vllm_model(vram_bytes=None, **changes)
    made_of = estimate_of(model)
    assert made_of is not None
    command = engine(EngineKind.VLLM).command(sized(model), CONTEXT)
    assert option(command, "--kv-cache-memory-bytes") == str(made_of.kv_cache_bytes)


@pytest.mark.parametrize(
    "changes",
    [{"params": 9e9}, {"params": 9e9, "precision": "fp32"}, {"precision": "bf16"}],
)
def test_vllm_measures_the_kv_cache_when_it_cannot_be_told(changes: dict[str, object]) -> None:
    assert "--kv-cache-memory-bytes" not in vllm_command(**changes)


def test_vllm_on_the_cpu() -> None:
    model = vllm_model(gpus=0, ram_bytes=3 * GIB)
    command = engine(EngineKind.VLLM).command(model, CONTEXT)
    assert "--enable-sleep-mode" not in command
    assert "--gpu-memory-utilization" not in command
    assert engine(EngineKind.VLLM).environment(model, CONTEXT)["VLLM_SERVER_DEV_MODE"] == "1"
    assert engine(EngineKind.VLLM).residual_bytes(model, 1) == 0
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine(EngineKind.VLLM).environment(vllm_model(), CONTEXT)


@pytest.mark.parametrize(
    ("changes", "space"),
    [
        ({"ram_bytes": 16 * GIB, "params": 4 * GIB, "precision": "bf16"}, "6"),  # weights: 8 GiB; 16 - 8 - 2.0
        ({"ram_bytes": 8 * GIB}, "3"),
        ({"ram_bytes": GIB}, "1"),
        ({}, "4"),
        ({"args": ("--kv-cache-memory-bytes=1000000000",)}, None),
    ],
)
def test_vllm_kv_cache_on_the_cpu(changes: dict[str, object], space: str | None) -> None:
    model = vllm_model(gpus=0, vram_bytes=None, **changes)
    assert engine(EngineKind.VLLM).environment(model, CONTEXT).get("VLLM_CPU_KVCACHE_SPACE") == space


def test_vllm_sleep_off() -> None:
    assert "--enable-sleep-mode" not in vllm_command(sleep_level=0)


def test_vllm_wakes_from_level_2_by_reloading() -> None:
    found = engine(EngineKind.VLLM)
    assert [call.path for call in found.wake(1)] == ["/wake_up"]
    assert [call.path for call in found.wake(2)] == ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]
    assert found.wake(2)[1].body == {"method": "reload_weights"}
    assert found.sleep(2)[0].path == "/sleep?level=2&mode=abort"


def test_vllm_residual_grows_with_the_group_and_never_exceeds_the_model() -> None:
    found = engine(EngineKind.VLLM)
    assert found.residual_bytes(vllm_model(), 1) == pytest.approx(1.2 * GIB, abs=2)
    assert found.residual_bytes(vllm_model(gpus=8), 1) == pytest.approx(6.8 * GIB, rel=0.01)
    assert found.residual_bytes(vllm_model(vram_bytes=GIB), 2) == GIB


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (
            "(APIServer pid=6) INFO 11-20 model.py:1] Resolved architecture: LlamaForCausalLM",
            "starting the engine for LlamaForCausalLM",
        ),
        (
            "(EngineCore pid=7) INFO 11-20 core.py:1] Initializing a V1 LLM engine (v0.32.0) with config: ...",
            "starting the workers",
        ),
        ("(EngineCore pid=7) INFO 11-20 gpu_model_runner.py:1] Starting to load model org/m...", "loading weights"),
        ("Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.00s/it]", "loading weights 25 %"),
        ("Loading pt checkpoint shards: 100% Completed | 4/4 [00:01<00:03,  1.00s/it]", "loading weights 100 %"),
        ("Loading safetensors using Runai Model Streamer:  40% Completed | 4/9", "loading weights 40 %"),
        ("INFO [default_loader.py:1] Loading weights took 3.21 seconds", "weights loaded"),
        ("INFO Model loading took 14.2 GiB memory and 3.456789 seconds", "weights loaded, 14.2 GiB"),
        ("INFO torch.compile took 12.50 s in total", "compiled in 12.50 s"),
        ("INFO Available KV cache memory: 3.21 GiB", "KV cache 3.21 GiB"),
        ("INFO GPU KV cache size: 43,008 tokens", "KV cache 43,008 tokens"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  33%|###   | 5/15", "capturing CUDA graphs 33 %"),
        ("INFO Graph capturing finished in 5 secs, took 0.42 GiB", "CUDA graphs captured"),
        ("INFO init engine (profile, create kv cache, warmup model) took 20.12 s", "engine initialised"),
        ("INFO:     Application startup complete.", "serving"),
        ("INFO something else 12%", None),
    ],
)
def test_vllm_log_lines(line: str, status: str | None) -> None:
    assert status_of(engine(EngineKind.VLLM), line) == status


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "ValueError: Free memory on device cuda:0 (3.1/23.5 GiB) on startup is less than desired GPU memory utilization (0.9)",
        "ValueError: No available memory for the cache blocks.",
    ],
)
def test_vllm_out_of_memory_lines(line: str) -> None:
    pattern = engine(EngineKind.VLLM).out_of_memory
    assert pattern is not None
    assert pattern.search(line)


def test_sim_command() -> None:
    model = Model(name="tiny", id="tiny", engine=EngineKind.SIM, vram_bytes=6 * GIB, sim=Sim(load_time_s=0.5), args=("--x",))
    command = engine(EngineKind.SIM).command(model, CONTEXT)
    assert command[0] == "/usr/lib/mmd/bin/mmd-sim"
    assert option(command, "--load-time") == "0.5"
    assert option(command, "--gpus") == "{gpus}"
    assert option(command, "--vram") == str(6 * GIB)
    assert [word for word in command if "=" in word] == [f"0={24 * GIB}", f"1={24 * GIB}"]
    assert command[-1] == "--x"
    assert engine(EngineKind.SIM).residual_bytes(model, 1) == int(6 * GIB * 0.05)
    assert engine(EngineKind.SIM).residual_bytes(model, 2) == int(6 * GIB * 0.02)


def test_command_macros() -> None:
    model = Model(
        name="a/b",
        id="ab",
        engine=EngineKind.COMMAND,
        command=("/bin/x", "--port={port}", "--on", "{gpus}", "{socket}", "{model}:{id}"),
        args=("{other}",),
    )
    assert engine(EngineKind.COMMAND).command(model, CONTEXT) == (
        "/bin/x", "--port={port}", "--on", "{gpus}", CONTEXT.socket, "a/b:ab", "{other}",
    )  # fmt: skip
    assert engine(EngineKind.COMMAND).warm_up("a/b") is None


def test_command_without_a_command() -> None:
    with pytest.raises(MmdError, match="needs a `command`"):
        engine(EngineKind.COMMAND).command(Model(name="a", id="a", engine=EngineKind.COMMAND), CONTEXT)


def test_external_has_no_command() -> None:
    with pytest.raises(MmdError, match="does not start it"):
        engine(EngineKind.EXTERNAL).command(Model(name="a", id="a", engine=EngineKind.EXTERNAL), CONTEXT)


@pytest.mark.parametrize("kind", [EngineKind.COMMAND, EngineKind.EXTERNAL])
def test_engines_without_sleep_refuse(kind: EngineKind) -> None:
    with pytest.raises(MmdError, match="cannot sleep"):
        engine(kind).sleep(1)
    with pytest.raises(MmdError, match="cannot sleep"):
        engine(kind).wake(1)
