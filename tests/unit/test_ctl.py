"""mmdctl as people run it: the real program in a process, against a gateway on a Unix socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ctl_gateway import GIB, BreakOff, Gateway, Refusal, estimated, example, serving

from mmd.ctl.client import Client
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.reckoning import facts
from mmd.scope import ScopeKind
from mmd.status import EstimateStatus, GatewayStatus, ModelState, Progress, Reckoning, Status, model_from_json

MMDCTL = str(Path(sys.executable).with_name("mmdctl"))


def run(
    words: Sequence[str], *, path: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [MMDCTL, *(["--socket", str(path)] if path else []), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, env={**os.environ, **(environment or {})}, check=False
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin.sock"


@pytest.fixture
def gateway() -> Gateway:
    return Gateway(example(time.time()))


def test_status_shows_the_gateway_its_gpus_its_models_and_what_is_wrong(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        result = run(["status"], path=path)
    assert result.returncode == 0, result.stderr
    assert "mmd 0.1.0, up 3 h 12 min, pid 812; 2 in flight, 1 waiting" in result.stdout
    assert "listening on 127.0.0.1:8000, /run/api.sock" in result.stdout
    assert "NVIDIA H100" in result.stdout
    assert "14.2 / 24.0 GiB" in result.stdout
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.startswith("demo/")}
    assert lines["demo/llama-8b"][1:7] == ["ready", "0", "14.0", "GiB", "2", "0"]
    assert lines["demo/qwen-7b"][1:9] == ["sleeping", "(1)", "0", "1.0", "GiB", "0", "0", "12"]
    assert " ".join(lines["demo/mistral"]).endswith("loading weights 45 %")
    assert "demo/broken failed: it exited with status 1" in result.stdout
    assert "| log line 6" in result.stdout
    assert "mmdctl logs demo/broken" in result.stdout
    assert "\x1b" not in result.stdout


def test_status_tells_warnings_apart_from_problems(gateway: Gateway, path: Path) -> None:
    warned = replace(gateway.status.gateway, warnings=("mmd.yaml:3: gateway.listen.0: other machines reach it",))
    with serving(replace(gateway, status=replace(gateway.status, gateway=warned)), path):
        shown = run(["status"], path=path).stdout
    warnings = shown.partition("\nWarnings\n")[2]
    assert warnings == "  configuration: mmd.yaml:3: gateway.listen.0: other machines reach it\n"
    assert "the last good one is in use" not in shown
    assert Status.without_private(replace(gateway.status, gateway=warned)).gateway.warnings == ()


def test_status_of_some_models_and_as_json(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        result = run(["status", "--json", "llama", "demo/q*", "mmd-model-idle@0.service"], path=path)
    found = Status.from_json(json.loads(result.stdout))
    assert [model.name for model in found.models] == ["demo/llama-8b", "demo/qwen-7b", "demo/idle"]
    assert found.models[0] == gateway.status.models[0]


def mind_interrupts() -> None:
    """In the child: a shell that runs the tests in the background has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_status_watch_survives_a_gateway_that_comes_back(gateway: Gateway, path: Path) -> None:
    with subprocess.Popen(
        [MMDCTL, "--socket", str(path), "status", "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=mind_interrupts,
    ) as process:
        assert process.stdout
        assert "not running" in process.stdout.readline()
        with serving(gateway, path):
            assert any("demo/llama-8b" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == ""


def test_list_and_show(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        table = run(["list"], path=path).stdout
        names = run(["list", "--quiet"], path=path).stdout.splitlines()
        entries = json.loads(run(["list", "--json"], path=path).stdout)
        shown = run(["show", "gpt-4o-mini"], path=path).stdout
        raw = json.loads(run(["show", "idle", "--json"], path=path).stdout)
    assert "Never asked" in table
    assert names == [model.name for model in gateway.status.models]
    assert entries[4] == {
        "name": "demo/idle", "id": "idle", "engine": "sim", "aliases": [], "description": "Never asked", "gpus": 1,
        "vram_bytes": 6 * GIB, "pinned": False,
    }  # fmt: skip
    assert "Model: demo/llama-8b" in shown
    assert "Unit: mmd-model-llama@0.service" in shown
    assert raw["name"] == "demo/idle"


def test_show_tells_the_arithmetic_behind_a_model_s_memory(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        shown = run(["show", "qwen"], path=path).stdout
        raw = json.loads(run(["show", "qwen", "--json"], path=path).stdout)
    lines = [line.strip() for line in shown.splitlines()]
    first = lines.index("VRAM: 17.9 GiB while awake")
    assert lines[first + 1 : first + 5] == [
        "Estimated: 7.6 B x 2 bytes (bf16) = 14.2 GiB weights + 2.8 GiB KV cache + 2.4 GiB overhead = 19.4 GiB",
        "Measured: 17.9 GiB at most, so 17.9 GiB is reserved",
        "Start: 47 s (learned)",
        "Asleep: 1.2 GiB (measured) at level 1, and 14.2 GiB of host memory; awake in 2.9 s (guessed)",
    ]
    assert raw["reckoning"]["estimate"]["weights_bytes"] + raw["reckoning"]["estimate"]["kv_cache_bytes"] > 16 * GIB
    assert model_from_json(raw).reckoning == estimated()


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"declared_bytes": 18 * GIB}, ["Declared: 18.0 GiB"]),
        (
            {"declared_bytes": 18 * GIB, "measured_bytes": 17 * GIB},
            ["Declared: 18.0 GiB", "Measured: 17.0 GiB at most, so the declared 18.0 GiB is reserved"],
        ),
        (
            {"vram_bytes": 21 * GIB, "declared_bytes": 18 * GIB, "measured_bytes": 17 * GIB, "raised_bytes": 21 * GIB},
            [
                "Declared: 18.0 GiB",
                "Measured: 17.0 GiB at most",
                "Raised: to 21.0 GiB after it ran out of memory, so 21.0 GiB is reserved",
            ],
        ),
        (
            {"estimate": EstimateStatus(70e9, "int8", 1.0, 2, 33 * GIB, 7 * GIB, 3 * GIB, 43 * GIB)},
            [
                "Estimated: 70 B x 1 byte (int8) / 2 GPUs = 33.0 GiB weights + 7.0 GiB KV cache + 3.0 GiB overhead = 43.0 GiB",
            ],
        ),
    ],
)
def test_what_decides_is_said_last(changes: dict[str, Any], lines: list[str]) -> None:
    reckoning = Reckoning(**{"vram_bytes": 18 * GIB, "start_s": 60.0, "start_learned": False} | changes)
    assert [f"{title}: {words}" for title, words in facts(reckoning)] == [*lines, "Start: 60 s (guessed)"]


def test_an_unknown_model_is_named_with_the_nearest_one(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        for words in (["show", "demo/lama-8b"], ["start", "demo/lama-8b"], ["status", "demo/lama-8b"]):
            result = run(words, path=path)
            assert result.returncode == 4
            assert "did you mean demo/llama-8b?" in result.stderr
        assert "did you mean demo/broken?" in run(["show", "k"], path=path).stderr
        assert run(["stop", "nothing*"], path=path).returncode == 4
    assert all(method == "GET" for method, _, _ in gateway.asked)


def test_start_prints_plain_lines_and_how_it_ended(gateway: Gateway, path: Path) -> None:
    gateway.operations = {
        ("demo/idle", "start"): [
            Progress("demo/idle", ModelState.STARTING, "loading weights 45 %"),
            Progress("demo/idle", ModelState.STARTING, "loading weights 45 %"),
            Progress("demo/idle", ModelState.READY, "ready in 1.8 s, 14.2 GiB", done=True, elapsed_s=1.8),
        ]
    }
    with serving(gateway, path):
        result = run(["start", "mmd-model-idle@0"], path=path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["demo/idle: loading weights 45 %", "demo/idle: ready in 1.8 s, 14.2 GiB"]
    assert gateway.asked[-1] == ("POST", "/api/v1/models/demo%2Fidle/start", {})


def test_several_operations_run_at_once_and_the_worst_decides(gateway: Gateway, path: Path) -> None:
    together = threading.Barrier(2)
    failure = Progress("demo/qwen-7b", ModelState.FAILED, "out of memory", done=True, ok=False, tail=("CUDA OOM \x1b[31mred",))
    gateway.operations = {
        ("demo/llama-8b", "wake"): [together, Progress("demo/llama-8b", ModelState.READY, "awake in 1.8 s", done=True)],
        ("demo/qwen-7b", "wake"): [together, failure],
    }
    with serving(gateway, path):
        result = run(["wake", "llama", "qwen", "llama"], path=path)
    assert result.returncode == 1
    assert result.stdout.splitlines() == ["demo/llama-8b: awake in 1.8 s"]
    assert result.stderr.splitlines() == ["demo/qwen-7b: out of memory", "  | CUDA OOM red", "  mmdctl logs demo/qwen-7b"]


def test_json_is_the_progress_as_it_comes(gateway: Gateway, path: Path) -> None:
    steps = [
        Progress("demo/llama-8b", ModelState.DRAINING, "draining"),
        Progress("demo/llama-8b", ModelState.SLEEPING, "asleep", done=True, freed_bytes=13 * GIB),
    ]
    gateway.operations = {("demo/llama-8b", "sleep"): steps}
    with serving(gateway, path):
        result = run(["sleep", "llama", "--level", "2", "--force", "--json"], path=path)
    assert [Progress.from_json(json.loads(line)) for line in result.stdout.splitlines()] == steps
    assert gateway.asked[-1][2] == {"level": 2, "force": True}


def test_all_means_the_models_that_it_makes_sense_for(gateway: Gateway, path: Path) -> None:
    names = ["demo/llama-8b", "demo/qwen-7b", "demo/mistral", "demo/broken"]
    gateway.operations = {(name, "stop"): [Progress(name, ModelState.STOPPED, "stopped", done=True)] for name in names}
    gateway.operations |= {("demo/llama-8b", "sleep"): [Progress("demo/llama-8b", ModelState.SLEEPING, "asleep", done=True)]}
    with serving(gateway, path):
        stopped = run(["stop", "--all"], path=path)
        slept = run(["sleep", "--all"], path=path)
    assert sorted(stopped.stdout.splitlines()) == sorted(f"{name}: stopped" for name in names)
    assert slept.stdout.splitlines() == ["demo/llama-8b: asleep"]


def test_no_wait_leaves_when_it_has_begun(gateway: Gateway, path: Path) -> None:
    never = threading.Event()
    gateway.operations = {("demo/idle", "start"): [Progress("demo/idle", ModelState.STARTING, "starting"), never]}
    with serving(gateway, path):
        result = run(["start", "demo/idle", "--no-wait"], path=path)
        never.set()
    assert (result.returncode, result.stdout) == (0, "demo/idle: starting\n")


def test_interrupt_only_stops_watching(gateway: Gateway, path: Path) -> None:
    never = threading.Event()
    gateway.operations = {("demo/idle", "start"): [Progress("demo/idle", ModelState.STARTING, "starting"), never]}
    with (
        serving(gateway, path),
        subprocess.Popen(
            [MMDCTL, "--socket", str(path), "start", "demo/idle"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=mind_interrupts,
        ) as process,
    ):
        assert process.stdout
        assert process.stdout.readline() == "demo/idle: starting\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        never.set()
    assert process.returncode == 130
    assert errors.splitlines() == ["stopped watching; the start of demo/idle goes on:", "  mmdctl status demo/idle"]


def test_a_refusal_says_what_the_gateway_says(gateway: Gateway, path: Path) -> None:
    gateway.operations = {
        ("demo/idle", "start"): Refusal(409, "demo/idle needs 30.0 GiB; GPU 0 has 23.0 GiB"),
        ("demo/idle", "wake"): Refusal(404, "no model is called demo/idle"),
    }
    with serving(gateway, path):
        refused = run(["start", "idle"], path=path)
        gone = run(["wake", "idle"], path=path)
    assert (refused.returncode, refused.stderr) == (1, "demo/idle: demo/idle needs 30.0 GiB; GPU 0 has 23.0 GiB\n")
    assert gone.returncode == 4


def test_a_gateway_that_dies_during_an_operation(gateway: Gateway, path: Path) -> None:
    gateway.operations = {("demo/idle", "start"): [Progress("demo/idle", ModelState.STARTING, "starting"), BreakOff()]}
    with serving(gateway, path):
        result = run(["start", "idle"], path=path)
    assert result.returncode == 3
    assert "journalctl -u mmd-gateway" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_gateway_that_is_down(path: Path) -> None:
    result = run(["status"], path=path)
    assert result.returncode == 3
    assert result.stderr.startswith("mmdctl: mmd-gateway is not running")
    assert "systemctl start mmd-gateway.socket mmd-admin.socket" in result.stderr
    user = run(["--user", "status"], environment={"XDG_RUNTIME_DIR": str(path.parent)})
    assert "systemctl --user start mmd-gateway.socket mmd-admin.socket" in user.stderr
    with socket.socket(socket.AF_UNIX) as listener:  # bound and closed: the file stays, nobody listens
        listener.bind(str(path))
    assert "is not running" in run(["status"], path=path).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed, and only root may become one")
def test_a_socket_that_may_not_be_opened(gateway: Gateway, path: Path) -> None:
    with serving(gateway, path):
        path.chmod(0o600)
        for parent in path.parents[:3]:
            parent.chmod(0o755)
        result = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, "--socket", str(path), "status"], capture_output=True, text=True, check=False
        )
    assert result.returncode == 3
    assert "join group mmd-admin (usermod -aG mmd-admin $USER) or use sudo" in result.stderr


_AS_NOBODY = """
import os, sys
from mmd.ctl.main import main
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(main())
"""


def test_a_gateway_that_hangs_up_or_talks_nonsense(path: Path) -> None:
    for answer in (
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ):
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            thread = threading.Thread(target=_answer_once, args=(listener, answer))
            thread.start()
            result = run(["status"], path=path)
            thread.join()
        assert result.returncode == 3
        assert "journalctl -u mmd-gateway" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_gateway_that_hangs(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(CtlError, match="did not answer in time") as caught:
            Client(path, ScopeKind.USER, answer_timeout_s=0.1).status()
    assert caught.value.exit_code is Exit.UNREACHABLE
    assert caught.value.hint == "journalctl --user -u mmd-gateway"


def _answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(answer)


def test_version(gateway: Gateway, path: Path) -> None:
    assert run(["version"], path=path).stdout == "mmdctl 0.1.0\nmmd-gateway cannot be reached\n"
    with serving(gateway, path):
        assert run(["version"], path=path).stdout == "mmdctl 0.1.0\nmmd-gateway 0.1.0\n"
        assert json.loads(run(["version", "--json"], path=path).stdout) == {"mmdctl": "0.1.0", "mmd_gateway": "0.1.0"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["start"],
        ["stop"],
        ["stop", "--all", "x"],
        ["sleep", "x", "--level", "3"],
        ["start", "x", "--placement", "0"],
        ["logs", "x", "--gateway"],
        ["logs", "-n", "many"],
        ["show"],
    ],
)
def test_usage_errors_end_with_2(words: list[str]) -> None:
    result = run(words)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_traceback(path: Path) -> None:
    many = Status(GatewayStatus("0.1.0", 1, 0.0), models=example(0.0).models * 2000)
    with serving(Gateway(many), path):
        result = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {MMDCTL} --socket {path} list -q | head -1"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (result.returncode, result.stdout, result.stderr) == (141, "demo/llama-8b\n", "")
