"""The whole path with a real engine: vLLM's CPU build behind the gateway, under a real systemd (`tests/run --vllm`).

A load takes half a minute or more, so the tests share what is loaded and run in this order. Most of them let vLLM believe in
one GPU of 5 GiB, of which either model wants 2.5, and as much of the host's memory while it sleeps: on the CPU its sleep keeps
the memory, but its server, its scheduler and its sleep and wake calls are the real ones. The last ones use the CPU as one
would, with `gpus: 0` and a budget of host memory.

What was measured is printed at the end.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from client import Answer, chat, stream
from fake_hub import fake_hub
from testbed import CHECKOUT, Installation

pytestmark = [pytest.mark.vllm, pytest.mark.system, pytest.mark.timeout(240)]

_VENV = Path(os.environ.get("MMD_VLLM_VENV") or CHECKOUT / "build" / "vllm")
_LOAD_LIMIT_S = 180.0
"""Seen: 33 to 50 s on two cores."""

_MODELS = """
gpus: {provider: static, devices: [{memory: 5GiB}]}
resources: {ram: 5GiB}
policy: {min_residency: 0s}
defaults:
  venv: /opt/vllm
  args: [--max-model-len, "512", --enforce-eager]
profiles:
  as-on-a-gpu:
    vram: 2560MiB
    args: [--max-model-len, "512", --enforce-eager, --no-enable-sleep-mode, --kv-cache-memory-bytes, "256000000"]
models:
  org/first: {id: first, model: /srv/models/first, profile: as-on-a-gpu}
  org/second: {id: second, model: /srv/models/second, profile: as-on-a-gpu}
  missing: {model: /srv/models/missing, profile: as-on-a-gpu}
  cpu-first: {model: /srv/models/first, gpus: 0, ram: 3GiB}
  cpu-second: {model: /srv/models/second, gpus: 0, ram: 3GiB}
"""

_FIRST, _SECOND = "mmd-model-first@0.service", "mmd-model-second@0.service"


class Figures:
    """What was measured, in the order of the tests."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, what: str, value: float, unit: str = "s") -> None:
        self.lines.append(f"{what:<60} {value:8.2f} {unit}")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.note(what, time.monotonic() - begun)


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    found = Figures()
    yield found
    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    assert terminal is not None
    assert capture is not None
    with capture.global_and_fixture_disabled():
        terminal.write("\n" + "\n".join(found.lines) + "\n")


@pytest.fixture(scope="module")
def serving() -> Iterator[Installation]:
    if not (_VENV / "bin" / "python").exists():
        pytest.skip(f"there is no vLLM in {_VENV}: tests/run --vllm")
    if os.geteuid() != 0:
        pytest.skip("a private systemd needs root")
    with Installation(binds=[f"{_VENV}:/opt/vllm"]) as installation, installation.network():
        make = CHECKOUT / "tests" / "vllm" / "make_models.py"
        installation.run("/opt/vllm/bin/python", make, "/srv/models", "first", "second", timeout_s=120)
        installation.configure(_MODELS)
        yield installation


def _say(model: str) -> str:
    """The answer of `model`, the same each time, loaded first if need be."""
    answer = chat(model, "the quick fox", timeout_s=_LOAD_LIMIT_S, temperature=0, max_tokens=16)
    assert answer.status == 200, answer.text
    assert answer.json["model"] == model
    text: str = answer.json["choices"][0]["message"]["content"]
    return text


def _states(serving: Installation) -> dict[str, str]:
    return {model["name"]: model["state"] for model in serving.status()["models"]}


def _pss_mib(serving: Installation, pid: int | str) -> float:
    """Memory of a process, what it shares with others in parts (proc(5), smaps_rollup)."""
    lines = serving.read(f"/proc/{pid}/smaps_rollup").splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def _pids(serving: Installation, unit: str) -> list[str]:
    """The processes of a unit."""
    return serving.run("cat", f"/sys/fs/cgroup{serving.show(unit, 'ControlGroup')}/cgroup.procs").stdout.split()


def _is_sleeping(serving: Installation, instance: str) -> bool:
    """What vLLM itself says."""
    socket = f"/run/mmd-model/{instance}/engine.sock"
    return serving.run("curl", "-sf", "--unix-socket", socket, "http://localhost/is_sleeping").stdout == '{"is_sleeping":true}'


class Asking(threading.Thread):
    """A chat request in the background; it may end without an answer."""

    def __init__(self, model: str, timeout_s: float = _LOAD_LIMIT_S) -> None:
        super().__init__()
        self.answer: Answer | None = None
        self._model, self._timeout_s = model, timeout_s
        self.start()

    def run(self) -> None:
        try:
            self.answer = chat(self._model, timeout_s=self._timeout_s)
        except OSError:
            self.answer = None


def test_the_first_request_starts_the_gateway_and_the_model(serving: Installation, figures: Figures) -> None:
    serving.systemctl("stop", "mmd-gateway.service")
    seen: list[str] = []
    begun = time.monotonic()
    asking = Asking("org/first")
    while asking.is_alive():
        status = serving.show(_FIRST, "StatusText")
        if status and status not in seen:
            seen.append(status)
        asking.join(0.2)
    cold_s = time.monotonic() - begun
    assert asking.answer is not None
    assert asking.answer.status == 200, asking.answer.text
    assert seen[0] == "starting"
    assert "starting the engine for LlamaForCausalLM" in seen
    assert len(seen) >= 4, seen
    assert serving.show(_FIRST, "StatusText").startswith("ready, loaded in ")
    report = json.loads(serving.read("/run/mmd-model/first@0/report.json"))
    figures.note("cold start: request to answer, the gateway stopped", cold_s)
    figures.note("  of which vLLM's own, start to healthy", report["load_s"])
    figures.note("  healthy to READY (one warm-up request)", report["warm_up_s"])


def test_every_endpoint_answers_an_openai_client(serving: Installation) -> None:
    lines = list(stream("org/first"))
    assert lines[-2] == "data: [DONE]"
    with openai.OpenAI(base_url=f"{serving.api}/v1", api_key="none", max_retries=0) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
        reply = client.chat.completions.create(model="org/first", messages=messages, max_tokens=8)
        assert reply.choices[0].message.content
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 8
        pieces = client.chat.completions.create(model="org/first", messages=messages, max_tokens=8, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert client.completions.create(model="org/first", prompt="the fox", max_tokens=8).choices[0].text
        assert client.responses.create(model="org/first", input="hello", max_output_tokens=8).output_text
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(model="org/first", prompt="fox " * 600, max_tokens=8)


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(serving: Installation, figures: Figures, level: int) -> None:
    before = _say("org/first")
    for who in ("mmdctl", "a request"):
        slept = serving.ctl("sleep", "org/first", "--level", str(level)).stdout
        assert "slept in" in slept
        assert _is_sleeping(serving, "first@0")
        assert _states(serving)["org/first"] == "sleeping"
        with figures.timed(f"level {level}, woken by {who}"):
            after = serving.ctl("wake", "org/first").stdout if who == "mmdctl" else _say("org/first")
        assert who != "mmdctl" or "awake in" in after
        assert not _is_sleeping(serving, "first@0")
        assert _say("org/first") == before, "the same weights, no garbage"


def test_the_runner_is_small_next_to_its_engine(serving: Installation, figures: Figures) -> None:
    runner = serving.show(_FIRST, "MainPID")
    engine_mib = sum(_pss_mib(serving, pid) for pid in _pids(serving, _FIRST) if pid != runner)
    figures.note("memory of mmd-runner", _pss_mib(serving, runner), "MiB")
    figures.note("memory of vLLM's processes", engine_mib, "MiB")
    figures.note("memory of mmd-gateway", _pss_mib(serving, serving.show("mmd-gateway.service", "MainPID")), "MiB")
    assert _pss_mib(serving, runner) < 16


def test_a_load_outlives_its_gateways_and_is_not_repeated(serving: Installation, figures: Figures) -> None:
    """The first must sleep for the second; meanwhile the gateway is restarted, then killed."""
    before = _say("org/first")
    begun = time.monotonic()
    Asking("org/second", timeout_s=2).join()
    assert serving.show(_SECOND, "ActiveState") == "activating", "its client has gone, the load goes on"
    run = serving.show(_SECOND, "InvocationID")
    assert _states(serving) | {"org/first": "sleeping", "org/second": "starting"} == _states(serving)
    with figures.timed("systemctl restart mmd-gateway while a model loads"):
        serving.systemctl("restart", "mmd-gateway.service")
    cut_off = Asking("org/second")
    serving.wait_until(lambda: serving.status()["gateway"]["waiting"] == 1, 10, "the new gateway lets it wait for the load")
    serving.systemctl("kill", "--signal=KILL", "mmd-gateway.service")
    second = _say("org/second")
    figures.note("the other model's first answer, gateway restarted and killed", time.monotonic() - begun)
    cut_off.join()
    assert cut_off.answer is None, "its connection died with the gateway"
    assert serving.show(_SECOND, "InvocationID") == run, "adopted"
    assert serving.show(_SECOND, "NRestarts") == "0"
    assert second != before, "two models"


def test_models_take_turns(serving: Installation, figures: Figures) -> None:
    second = _say("org/second")
    for turn in range(2):
        with figures.timed(f"swap by sleep and wake, turn {turn + 1}"):
            _say("org/first")
        assert _states(serving) | {"org/first": "ready", "org/second": "sleeping"} == _states(serving)
        assert _is_sleeping(serving, "second@0")
        assert _say("org/second") == second


def test_a_new_gateway_knows_who_sleeps(serving: Installation) -> None:
    first = _say("org/first")
    serving.ctl("sleep", "org/first", "--level", "2")
    states = _states(serving)
    assert states["org/first"] == states["org/second"] == "sleeping"
    serving.systemctl("kill", "--signal=KILL", "mmd-gateway.service")
    serving.wait_until(lambda: serving.ctl("status", check=False).returncode == 0, 10, "a new one is there")
    assert _states(serving) == states
    assert _say("org/first") == first, "woken as from level 2"


def test_the_journal_has_vllms_log_by_model(serving: Installation) -> None:
    log = serving.journal("MMD_MODEL=first")
    assert "Application startup complete" in log
    assert "/srv/models/first" in log
    assert "/srv/models/second" not in log
    assert "GET /health" not in log, "what the runner asks all the time"
    assert "/srv/models/second" in serving.ctl("logs", "org/second", "--lines", "2000").stdout


def test_a_wrong_path_is_a_503_with_vllms_last_words(serving: Installation, figures: Figures) -> None:
    with figures.timed("a model that is not there: request to 503"):
        answer = chat("missing", timeout_s=_LOAD_LIMIT_S)
    assert answer.status == 503
    first_line, *tail = answer.error["message"].splitlines()
    assert first_line == "missing: the engine exited with status 1 while loading"
    assert "/srv/models/missing" in tail[-1]
    assert int(answer.headers["retry-after"]) >= 1
    assert "/srv/models/missing" in serving.ctl("status").stdout


def test_a_stop_while_it_loads_ends_it_at_once(serving: Installation, figures: Figures) -> None:
    serving.ctl("stop", "org/second")
    asking = Asking("org/second")
    serving.wait_until(lambda: serving.show(_SECOND, "StatusText") == "starting the workers", 60, "vLLM has children")
    pids = _pids(serving, _SECOND)
    assert len(pids) >= 3, "the runner, the API server, EngineCore"
    with figures.timed("mmdctl stop while a model loads"):
        serving.ctl("stop", "org/second")
    assert not [pid for pid in pids if serving.path(f"/proc/{pid}").exists()], "no orphans"
    assert serving.show(_SECOND, "ActiveState") == "inactive"
    asking.join()
    assert asking.answer is not None
    assert asking.answer.status == 503
    assert asking.answer.error["code"] == "stopped"


def test_on_the_cpu_a_model_stops_for_another(serving: Installation, figures: Figures) -> None:
    """Sleep would free no host memory."""
    serving.ctl("stop", "org/first")
    with figures.timed("gpus: 0, request to answer"):
        first = _say("cpu-first")
    with figures.timed("gpus: 0, the other one instead"):
        second = _say("cpu-second")
    assert first != second
    assert _states(serving) | {"cpu-first": "stopped", "cpu-second": "ready"} == _states(serving)
    unit_mib = sum(_pss_mib(serving, pid) for pid in _pids(serving, "mmd-model-cpu-second@cpu.service"))
    figures.note("gpus: 0, ram: 3GiB, memory of the unit", unit_mib, "MiB")
    assert unit_mib < 3 * 1024, "what it declares"


def test_a_dead_engine_core_is_noticed(serving: Installation, figures: Figures) -> None:
    unit = "mmd-model-cpu-second@cpu.service"
    pids = _pids(serving, unit)
    core = next(pid for pid in pids if serving.read(f"/proc/{pid}/cmdline").startswith("VLLM::EngineCore"))
    with figures.timed("EngineCore killed to unit failed"):
        serving.run("kill", "-KILL", core)
        serving.wait_until(lambda: serving.show(unit, "ActiveState") == "failed", 30, "its unit has failed")
    assert not [pid for pid in pids if serving.path(f"/proc/{pid}").exists()], "no orphans"


def test_a_model_from_a_hub(serving: Installation, figures: Figures) -> None:
    """Fetched by its own unit; vLLM finds it in the cache, which it cannot write, and asks no hub."""
    serving.stop_all()
    files = {path.name: path.read_bytes() for path in serving.path("/srv/models/first").iterdir()}
    with fake_hub("org/hub", files) as hub:
        model = f"{{id: hub, gpus: 0, ram: 3GiB, env: {{HF_ENDPOINT: '{hub.endpoint}'}}}}"
        serving.configure(f"{_MODELS}  org/hub: {model}\n")
        with figures.timed("a model from a hub on loopback, request to answer"):
            _say("org/hub")
        assert hub.asked
    assert "fetched org/hub@main" in serving.ctl("logs", "org/hub", "--lines", "2000").stdout
    assert serving.run("find", "/var/cache/mmd/huggingface", "!", "-user", "mmd-fetch").stdout == ""
