"""mmd-runner as a process: what it tells systemd, what it reports, how it ends, and what it leaves behind (nothing)."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mmd.config import EngineKind, Model, Sim
from mmd.engines import engine
from mmd.engines.base import CommandContext
from mmd.report import FailureReason, Report
from mmd.sim.ledger import Ledger

GIB = 1 << 30
INVOCATION = "0123456789abcdef0123456789abcdef"


class Unit:
    """A runner with a notification socket, as systemd would start it."""

    def __init__(self, directory: Path, arguments: Sequence[str], *, watchdog_s: float | None = None) -> None:
        self.directory = directory
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory.parent / "notify"))
        self._socket.setblocking(False)
        environment = {**os.environ, "NOTIFY_SOCKET": str(directory.parent / "notify"), "INVOCATION_ID": INVOCATION}
        if watchdog_s is not None:
            environment |= {"WATCHDOG_USEC": str(int(watchdog_s * 1e6))}
        self.log_file = directory.parent / "log"
        with self.log_file.open("wb") as log:
            command = [sys.executable, "-m", "mmd.runner", *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def close(self) -> None:
        for pid in [*self.descendants(), self.process.pid]:
            if pid != self.process.pid or self.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._socket.close()

    def receive(self) -> list[str]:
        """All notifications so far, one assignment each."""
        while True:
            try:
                self.messages += self._socket.recv(65536).decode().splitlines()
            except BlockingIOError:
                return self.messages

    def wait_for(self, message: str, *, timeout_s: float = 20.0) -> None:
        wait_until(lambda: message in self.receive() or self.process.poll() is not None, timeout_s=timeout_s)
        assert message in self.receive(), (self.messages, self.log)

    def wait(self, *, timeout_s: float = 20.0) -> int:
        """The runner's exit status; nothing of its engine may be left."""
        family = self.descendants()
        status = self.process.wait(timeout_s)
        wait_until(lambda: not any(alive(pid) for pid in family), timeout_s=2)
        return status

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def descendants(self) -> list[int]:
        return descendants(self.process.pid)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def statuses(self) -> list[str]:
        return [message.removeprefix("STATUS=") for message in self.receive() if message.startswith("STATUS=")]

    @property
    def report(self) -> Report:
        found = Report.read(self.directory)
        assert found is not None
        return found


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


Start = Callable[..., Unit]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a runner with these arguments before `--` and this engine command after it."""
    units: list[Unit] = []

    def begin(
        command: Sequence[str], *extra: str, kind: str = "sim", gpus: str = "cpu", watchdog_s: float | None = None
    ) -> Unit:
        directory = tmp_path / f"m@{gpus}"
        directory.mkdir(exist_ok=True)
        fixed = ("--model", "org/m", "--engine", kind, "--gpus", gpus, "--definition", "abc", "--directory", str(directory))
        unit = Unit(directory, [*fixed, *extra, "--", *command], watchdog_s=watchdog_s)
        units.append(unit)
        return unit

    yield begin
    for unit in units:
        unit.close()


def sim(tmp_path: Path, *args: str, gpus: str = "cpu", vram_gib: int = 0, load_s: float = 0.3) -> list[str]:
    """The engine command that the unit generator would write."""
    model = Model(
        name="org/m",
        id="m",
        engine=EngineKind.SIM,
        gpus=0 if gpus == "cpu" else 1,
        vram_bytes=vram_gib * GIB,
        sim=Sim(load_time_s=load_s, tokens_per_second=0),
        args=args,
    )
    context = CommandContext(
        socket=str(tmp_path / f"m@{gpus}" / "engine.sock"),
        bin_dir=str(Path(sys.executable).parent),
        cache_dir=str(tmp_path),
        sim_dir=str(tmp_path / "sim"),
        gpu_memory_bytes={0: 24 * GIB, 1: 24 * GIB},
    )
    return list(engine(EngineKind.SIM).command(model, context))


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def ask(unit: Unit, path: str, body: str = "") -> int:
    """The status of one request to the unit's engine."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(unit.directory / "engine.sock"))
        method = "POST" if body else "GET"
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: m\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        return int(client.recv(64).split()[1] or b"0")


def test_from_start_to_stop(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, gpus="1", vram_gib=6), gpus="1", watchdog_s=2)
    unit.wait_for("READY=1")
    report = unit.report
    assert (report.invocation, report.definition, report.ready) == (INVOCATION, "abc", True)
    assert report.endpoint == f"unix:{unit.directory / 'engine.sock'}"
    assert 0.3 < report.load_s < 15
    assert 0 < report.warm_up_s < 5
    assert (unit.directory / "report.json").stat().st_mode & 0o777 == 0o640
    percentages = [int(match[1]) for status in unit.statuses if (match := re.fullmatch(r"loading weights (\d+) %", status))]
    assert percentages == sorted(set(percentages))
    assert len(percentages) > 5, "lines that come together make one status"
    assert unit.statuses[0] == "starting"
    assert unit.messages.index("STATUS=warming up") < unit.messages.index("READY=1")
    assert "EXTEND_TIMEOUT_USEC=30000000" in unit.messages
    wait_until(lambda: any(status.startswith("ready, loaded in") for status in unit.statuses), timeout_s=2)
    assert "Application startup complete." in unit.log
    assert [allocation.gpu for allocation in Ledger(tmp_path / "sim").read()] == [1]
    unit.wait_for("WATCHDOG=1")
    assert unit.stop() == 0
    assert "STOPPING=1" in unit.receive()
    assert Ledger(tmp_path / "sim").read() == ()


def test_a_stale_socket_is_removed_before_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "m@cpu").mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "m@cpu" / "engine.sock"))
    unit = start(python(f"import os; print('stale', os.path.exists({str(tmp_path / 'm@cpu' / 'engine.sock')!r}))"))
    assert unit.wait() == 69
    assert "stale False" in unit.log


def test_engine_exits_during_load(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--exit-during-load", "3"))
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.EXITED
    assert unit.report.message == "the engine exited with status 3 while loading"
    assert not unit.report.ready
    assert unit.report.tail[-1] == "RuntimeError: told to exit while loading"
    assert "READY=1" not in unit.receive()
    assert unit.statuses[-1] == unit.report.message


def test_engine_runs_out_of_memory(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, gpus="0", vram_gib=25), gpus="0")
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.OUT_OF_MEMORY
    assert "CUDA out of memory" in unit.report.tail[-1]


def test_engine_never_becomes_healthy(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--never-healthy"), "--health-timeout", "1.0")
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.UNHEALTHY
    assert "no progress for 1 s" in unit.report.message


def test_talk_that_repeats_itself_is_no_progress(start: Start) -> None:
    code = "import time\nfor n in range(9999): print(f'still waiting ({n})'); time.sleep(0.05)"
    started = time.monotonic()
    unit = start(python(code), "--health-timeout", "0.8", kind="command")
    assert unit.wait() == 69
    assert time.monotonic() - started < 6
    assert unit.report.failure == FailureReason.UNHEALTHY


def test_progress_keeps_a_slow_start_alive(start: Start) -> None:
    code = (
        "import sys, time\n"
        "for percent in range(0, 100, 10): print(f'Loading: {percent}%'); time.sleep(0.4)\n"
        "import http.server\n"
        "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')\n"
    )
    arguments = ("--listen", "tcp", "--health-path", "/", "--health-timeout", "3")
    unit = start([*python(code), "{port}"], *arguments, kind="command")
    unit.wait_for("READY=1")
    assert unit.report.load_s > 4


def test_a_silent_start_within_the_timeout_is_left_alone(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--silent-load", load_s=1.5), "--health-timeout", "8")
    unit.wait_for("READY=1")
    assert "EXTEND_TIMEOUT_USEC=30000000" in unit.receive()


def test_a_refused_warm_up_is_a_failed_start(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--refuse-warm-up"))
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.UNHEALTHY
    assert "warm-up request failed: it answers 500" in unit.report.message


def test_no_warm_up(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--refuse-warm-up"), "--no-warm-up")
    unit.wait_for("READY=1")
    assert "STATUS=warming up" not in unit.messages


def test_engine_dies_while_serving(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--die-after-requests", "1"))
    unit.wait_for("READY=1")
    with pytest.raises((OSError, IndexError)):
        ask(unit, "/v1/completions", '{"prompt": "x"}')
    assert unit.wait() == 1
    assert unit.report.failure == FailureReason.DIED
    assert unit.report.message == "the engine exited with status 1 while serving"
    assert "told to die" in unit.report.tail[-1]


def test_engine_stalls_while_serving(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--stall-after-requests", "1"), watchdog_s=4)
    unit.wait_for("READY=1")
    assert unit.wait() == 1
    assert unit.report.failure == FailureReason.STALLED
    silent = re.fullmatch(r"the engine does not answer; it was last healthy (.*) s ago", unit.report.message)
    assert silent is not None
    assert 3 <= float(silent[1]) < 4, "the report is written before systemd's watchdog strikes"
    assert "WATCHDOG=1" not in unit.receive()


def test_a_dead_engine_core_is_noticed(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--unhealthy-after-requests", "1"), watchdog_s=4)
    unit.wait_for("READY=1")
    assert unit.wait() == 1
    assert unit.report.failure == FailureReason.STALLED
    assert "answers 503" in unit.report.message


def test_a_slow_answer_is_not_a_dead_engine(start: Start, tmp_path: Path) -> None:
    """One answer takes longer than a check waits; the engine lives on."""
    code = (
        "import http.server, sys, time\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    asked = 0\n"
        "    def do_GET(self):\n"
        "        Handler.asked += 1\n"
        "        time.sleep(1.3 if Handler.asked == 2 else 0)\n"
        "        self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *_): print('asked', Handler.asked, flush=True)\n"
        "http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    unit = start([*python(code), "{port}"], "--listen", "tcp", kind="command", watchdog_s=4)
    unit.wait_for("READY=1")
    unit.wait_for("WATCHDOG=1")
    assert unit.process.poll() is None
    assert unit.stop() == 0


def test_stopping_a_load_kills_everything_at_once(start: Start) -> None:
    """An engine that ignores SIGTERM, with a helper in a session of its own that outlives its parent."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['setsid', '-f', 'sleep', '60'])\n"
        "print('up'); time.sleep(60)\n"
    )
    unit = start(python(code))
    wait_until(lambda: "up" in unit.log and len(unit.descendants()) >= 2, timeout_s=10)
    started = time.monotonic()
    assert unit.stop() == 0
    assert time.monotonic() - started < 2


def test_an_engine_that_ignores_sigterm_is_killed_by_the_second(start: Start, tmp_path: Path) -> None:
    unit = start(sim(tmp_path, "--ignore-sigterm"))
    unit.wait_for("READY=1")
    unit.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM ignored" in unit.log, timeout_s=5)
    assert unit.process.poll() is None
    assert unit.stop() == 0


def test_tcp_with_health_and_stop_commands(start: Start, tmp_path: Path) -> None:
    flag = tmp_path / "stopped"
    unit = start(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"],
        *("--listen", "tcp"),
        *(f"--health-command={word}" for word in python("import socket; socket.create_connection(('127.0.0.1', {port}))")),
        *(f"--stop-command={word}" for word in ("cp", "/dev/null", f"{flag}-{{id}}-{{gpus}}")),
        kind="command",
        gpus="0-1",
    )
    unit.wait_for("READY=1")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", unit.report.endpoint)
    assert unit.stop() == 0
    assert (tmp_path / "stopped-m-0,1").exists()


def test_a_fixed_port_that_is_taken(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        unit = start(["sleep", "60"], "--listen", f"tcp:{port}", kind="command")
        assert unit.wait() == 69
    assert f"port {port} is not free" in unit.report.message


def test_what_the_engine_sees(start: Start) -> None:
    code = (
        "import os, sys\n"
        "print('args', sys.argv[1:])\n"
        "print('cuda', os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])\n"
        "print('notify', 'NOTIFY_SOCKET' in os.environ, 'WATCHDOG_USEC' in os.environ, os.environ['INVOCATION_ID'])\n"
        "print('stdin', sys.stdin.read())\n"
    )
    memory = (f"--vram={18 * GIB}", f"--gpu-memory=0={24 * GIB}", f"--gpu-memory=2={48 * GIB}")
    unit = start([*python(code), "{gpus}", "{vram_fraction}", "{other}", "{model}"], *memory, gpus="0-2", watchdog_s=9)
    assert unit.wait() == 69
    assert unit.log.splitlines()[:4] == [
        "args ['0,2', '0.7500', '{other}', '{model}']",
        "cuda 0,2 PCI_BUS_ID",
        f"notify False False {INVOCATION}",
        "stdin ",
    ]


def test_secrets_reach_the_engine_and_no_text(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "T").write_text("hf_abcdefgh\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    said = "print(os.environ['T'], len(os.environ['T']), 'CREDENTIALS_DIRECTORY' in os.environ)"
    unit = start(python(f"import os; {said}; raise SystemExit(3)"), "--secret", "T=/etc/t")
    assert unit.wait() == 69
    assert unit.report.tail == ("*** 11 False",)
    assert unit.log.startswith("*** 11 False\n")
    assert "hf_abcdefgh" not in unit.log + unit.report.to_json() + "".join(unit.receive())


def test_without_its_secret_an_engine_is_not_started(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "T").write_text("\n")  # the default that the unit has for a missing file
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    unit = start(python("print('started')"), "--secret", "T=/etc/t")
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.EXITED
    assert "models.org/m.secrets.T: /etc/t is missing or empty" in unit.report.message
    assert "started" not in unit.log


def test_a_program_that_is_missing(start: Start) -> None:
    unit = start(["/nowhere/vllm"])
    assert unit.wait() == 69
    assert unit.report.failure == FailureReason.EXITED
    assert unit.report.message == "/nowhere/vllm cannot be started: No such file or directory"


def test_it_loads_none_of_the_big_modules() -> None:
    heavy = "{'asyncio', 'subprocess', 'argparse', 'ssl', 'http', 'pynvml', 'yaml', 'logging', 'tempfile'}"
    code = f"import sys, mmd.runner; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_wrong_arguments() -> None:
    done = subprocess.run([sys.executable, "-m", "mmd.runner", "--modle", "m"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (64, "mmd-runner: unknown argument '--modle' (man mmd-runner)\n")
