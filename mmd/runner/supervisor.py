"""The runner's loop: one engine from its start to its end.

    LOADING --healthy--> WARMING_UP --answered--> SERVING --SIGTERM--> STOPPING
       |                     |                       |                    |
       '------ 69 -----------'                       '--- 1               '--- 0

Readiness. The health check passes, then one small request is answered, then the report is written, then READY=1.

Time-outs. systemd's start time-out is short and is extended every few seconds for as long as the runner is willing to wait: it
ends a runner that hangs. The runner itself gives up when there was no progress for `--health-timeout`. Progress is a new kind
of log line (`mmd.runner.output`). It is not CPU time: a server that rejects our health checks burns some for ever.

Watching. An engine with a hundred requests may answer its health check late. So a time-out is no failure by itself: the engine
has stalled when it has not answered for three quarters of the watchdog's time, early enough to say so in the report. A definite
answer (503, a refused connection) is believed when it has come three times in a row.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from mmd.engines import engine
from mmd.engines.base import HttpCall
from mmd.errors import MmdError
from mmd.printable import printable
from mmd.report import FailureReason, Report
from mmd.runner.check import Check, CommandCheck, HttpCheck, Outcome
from mmd.runner.launch import choose_port, engine_environment, expand, macros, visible_devices, write_report
from mmd.runner.loop import Loop
from mmd.runner.options import Options
from mmd.runner.output import EngineLog
from mmd.runner.process import become_subreaper, describe_exit, kill_family, reap, signal_group, spawn
from mmd.runner.secrets import Mask, read_secrets
from mmd.systemd.notify import Notifier, watchdog_interval_s

__all__ = ["Supervisor"]

_EX_UNAVAILABLE = 69  # sysexits.h: tells a failed start from the death of an engine that had been ready

_EXTEND_EVERY_S = 5.0
_EXTEND_BY_S = 30.0
"""EXTEND_TIMEOUT_USEC (sd_notify(3)): how long systemd waits for the next one before it calls the start hung."""

_LOADING_CHECK_TIMEOUT_S = 5.0
_COMMAND_CHECK_INTERVAL_S = 0.25
"""A health command is a new process each time: at the interval of HTTP checks it would take a CPU from the load."""

_SERVING_INTERVAL_S = 5.0
_SERVING_STALL_S = 30.0
"""Without a watchdog."""
_RECHECK_S = 0.5
_FAILURES_MAX = 3

_IDLE_S = 60.0
_STOP_COMMAND_TIMEOUT_S = 10.0
_DRAIN_S = 1.0
"""How long to read what a dead engine has left in the pipe."""


class _Phase(StrEnum):
    LOADING = "loading"
    WARMING_UP = "warming up"
    SERVING = "serving"
    STOPPING = "stopping"


class Supervisor:
    """One run of one engine."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._engine = engine(options.engine)
        self._environment = environment
        """The unit's; the engine's once it is launched."""
        self._invocation = environment.get("INVOCATION_ID", "")
        self._notifier = Notifier(report=_complain)  # model units take no level from a prefix: engines would set it as well
        self._watchdog_s = watchdog_interval_s(environment) or 0.0
        self._log = EngineLog(self._engine.progress, self._engine.out_of_memory, _pass_on)
        self._loop = Loop((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
        self._phase = _Phase.LOADING
        self._exit_status: int | None = None
        self._pid = 0
        self._output = -1
        self._port: int | None = None
        self._macros: dict[str, str] = {}
        self._check: Check | None = None
        self._check_due_s = 0.0
        self._extend_due_s = 0.0
        self._failures = 0
        self._stop_command: CommandCheck | None = None
        self._status = ""
        self._steps = 0
        now = time.monotonic()
        self._started_s = self._progress_s = self._healthy_s = now
        self._load_s = self._warm_up_s = 0.0

    def run(self) -> int:
        """Run the engine until it ends or is told to; the runner's exit status."""
        self._options.directory.mkdir(parents=True, exist_ok=True)
        become_subreaper()
        try:
            self._launch()
        except MmdError as error:
            return self._fail(FailureReason.EXITED, str(error))
        while self._exit_status is None:
            numbers = self._loop.wait(self._due_s(time.monotonic()), self._check)
            self._on_signals(numbers)
            if self._exit_status is None:
                self._tick(time.monotonic())
        return self._exit_status

    def _launch(self) -> None:
        options = self._options
        options.socket.unlink(missing_ok=True)  # vLLM leaves it behind and then fails to bind it (EADDRINUSE)
        self._port = choose_port(options.port) if options.listen_tcp else None
        devices = visible_devices(options.placement)
        secrets = read_secrets(options, self._environment)
        self._log.mask = Mask(secrets.values())
        self._environment = engine_environment({**self._environment, **secrets}, devices)
        self._macros = macros(options, devices, self._port, options.command)
        self._report()
        # Only these three: the unit generator has expanded the others, and what looks like them now is the user's.
        command = expand(options.command, self._macros, only=("{port}", "{gpus}", "{vram_fraction}"))
        self._output, writing = os.pipe()
        try:
            self._pid = spawn(command, self._environment, output=writing)
        finally:
            os.close(writing)
        os.set_blocking(self._output, False)
        self._loop.watch(self._output, self._read_output)
        self._started_s = self._progress_s = time.monotonic()
        self._say("starting")

    def _due_s(self, now: float) -> float:
        """When something is to be done even if nothing happens."""
        due = [now + _IDLE_S]
        if self._phase in (_Phase.LOADING, _Phase.WARMING_UP):
            due.append(self._extend_due_s)
        if self._phase == _Phase.LOADING:
            due.append(self._progress_s + self._options.health_timeout_s)
        if self._check is not None:
            due.append(now if self._check.outcome else self._check.deadline_s)
        elif self._phase in (_Phase.LOADING, _Phase.SERVING):
            due.append(self._check_due_s)
        if self._stop_command is not None:
            due.append(now if self._stop_command.outcome else self._stop_command.deadline_s)
        return min(due)

    # Events

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGCHLD in numbers:
            for pid, status in reap():
                self._on_exit(pid, status)
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT) and self._exit_status is None:
                self._stop()

    def _on_exit(self, pid: int, status: int) -> None:
        for check in (self._check, self._stop_command):
            if check is not None:
                check.finished(pid, status)
        if pid != self._pid or self._exit_status is not None:
            return
        how = describe_exit(status)
        if self._phase == _Phase.STOPPING:
            kill_family(self._pid)
            self._drain_output()
            self._exit_status = 0
        elif self._phase == _Phase.SERVING:
            self._fail(FailureReason.DIED, f"the engine {how} while serving")
        else:
            self._fail(FailureReason.EXITED, f"the engine {how} while {self._phase}")

    def _read_output(self) -> None:
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if data:
            self._log.feed(data)
        else:
            self._loop.unwatch(self._output)
            self._log.close()

    def _stop(self) -> None:
        """SIGTERM. A second one, from somebody at a terminal, means at once; systemd sends SIGKILL at TimeoutStopSec=."""
        if self._phase == _Phase.STOPPING:
            signal_group(self._pid, signal.SIGKILL)
            return
        self._notifier.stopping()
        self._end_check()
        if self._phase != _Phase.SERVING:  # still loading: SIGTERM would hang vLLM, and there is nothing to lose
            kill_family(self._pid)
            self._exit_status = 0
            return
        self._phase = _Phase.STOPPING
        if self._options.stop_command:
            command = expand(self._options.stop_command, self._macros)
            self._stop_command = CommandCheck(command, self._environment, timeout_s=_STOP_COMMAND_TIMEOUT_S)
        else:
            signal_group(self._pid, signal.SIGTERM)

    # Time

    def _tick(self, now: float) -> None:
        if self._check is not None:
            if now >= self._check.deadline_s and self._check.outcome is None:
                self._check.expire()
            if self._check.outcome is not None:
                self._on_outcome(self._check.outcome, now)
        if self._exit_status is not None:
            return
        match self._phase:
            case _Phase.LOADING | _Phase.WARMING_UP:
                self._tick_loading(now)
            case _Phase.STOPPING:
                self._tick_stopping(now)
            case _Phase.SERVING:
                pass
        due = self._phase in (_Phase.LOADING, _Phase.SERVING) and now >= self._check_due_s
        if self._exit_status is None and self._check is None and due:
            self._check = self._health_check()

    def _tick_loading(self, now: float) -> None:
        if self._log.steps != self._steps:
            self._steps = self._log.steps
            self._progress_s = now
        if self._phase == _Phase.LOADING and self._log.status:
            self._say(self._log.status)
        if self._phase == _Phase.LOADING and now >= self._progress_s + self._options.health_timeout_s:
            timeout_s = self._options.health_timeout_s
            self._fail(FailureReason.UNHEALTHY, f"the engine did not become healthy: no progress for {timeout_s:g} s")
        elif now >= self._extend_due_s:
            self._notifier.extend(_EXTEND_BY_S)
            self._extend_due_s = now + _EXTEND_EVERY_S

    def _tick_stopping(self, now: float) -> None:
        command = self._stop_command
        if command is not None and (command.outcome is not None or now >= command.deadline_s):
            command.close()
            self._stop_command = None
            signal_group(self._pid, signal.SIGTERM)

    # Checks

    def _health_check(self) -> Check:
        options = self._options
        timeout_s = _LOADING_CHECK_TIMEOUT_S
        if self._phase == _Phase.SERVING:  # several tries, the last of which ends when the engine counts as stalled
            left_s = self._healthy_s + self._stall_s - time.monotonic()
            timeout_s = min(self._stall_s / 3, max(left_s, _RECHECK_S / 10))
        if options.health_command:
            return CommandCheck(expand(options.health_command, self._macros), self._environment, timeout_s=timeout_s)
        return HttpCheck(self._address, HttpCall("GET", options.health_path, timeout_s=timeout_s))

    def _on_outcome(self, outcome: Outcome, now: float) -> None:
        self._end_check()
        match self._phase:
            case _Phase.LOADING:
                self._after_loading_check(outcome, now)
            case _Phase.WARMING_UP:
                self._after_warm_up(outcome, now)
            case _Phase.SERVING:
                self._after_serving_check(outcome, now)
            case _Phase.STOPPING:
                pass

    def _after_loading_check(self, outcome: Outcome, now: float) -> None:
        if not outcome.healthy:
            least_s = _COMMAND_CHECK_INTERVAL_S if self._options.health_command else 0.0
            self._check_due_s = now + max(self._options.health_interval_s, least_s)
            return
        self._load_s = now - self._started_s
        self._healthy_s = now
        call = self._engine.warm_up(self._options.model) if self._options.warm_up else None
        if call is None:
            self._become_ready(now)
            return
        self._phase = _Phase.WARMING_UP
        self._say("warming up")
        self._check = HttpCheck(self._address, call)

    def _after_warm_up(self, outcome: Outcome, now: float) -> None:
        """404 is a model of another kind (embeddings): vLLM does not offer it the route."""
        if outcome.status in (200, 404):
            self._warm_up_s = now - self._healthy_s
            self._become_ready(now)
        else:
            self._fail(FailureReason.UNHEALTHY, f"the engine is healthy but its warm-up request failed: it {outcome.text}")

    def _become_ready(self, now: float) -> None:
        self._phase = _Phase.SERVING
        self._log.start_serving()
        self._report(ready=True)
        self._notifier.ready()
        self._say(f"ready, loaded in {now - self._started_s:.1f} s")
        self._healthy_s = now
        self._check_due_s = now + self._serving_interval_s

    def _after_serving_check(self, outcome: Outcome, now: float) -> None:
        if outcome.healthy:
            self._healthy_s, self._failures = now, 0
            self._check_due_s = now + self._serving_interval_s
            if self._watchdog_s:
                self._notifier.watchdog()
            return
        self._failures += not outcome.timed_out
        self._check_due_s = now if outcome.timed_out else now + min(_RECHECK_S, self._serving_interval_s)
        silent_s = now - self._healthy_s
        if self._failures >= _FAILURES_MAX or silent_s >= self._stall_s:
            self._fail(FailureReason.STALLED, f"the engine {outcome.text}; it was last healthy {silent_s:.1f} s ago")

    @property
    def _address(self) -> Path | int:
        return self._options.socket if self._port is None else self._port

    @property
    def _serving_interval_s(self) -> float:
        return min(_SERVING_INTERVAL_S, self._watchdog_s / 4) if self._watchdog_s else _SERVING_INTERVAL_S

    @property
    def _stall_s(self) -> float:
        return self._watchdog_s * 3 / 4 if self._watchdog_s else _SERVING_STALL_S

    # What is told

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    def _fail(self, reason: FailureReason, message: str) -> int:
        """The end: nothing of the engine is left, the report says why, and so does the exit status."""
        served = self._phase == _Phase.SERVING
        self._end_check()
        if self._pid:
            kill_family(self._pid)
            self._drain_output()
        if reason == FailureReason.EXITED and self._log.ran_out_of_memory:
            reason, message = FailureReason.OUT_OF_MEMORY, f"{message}: it ran out of GPU memory"
        message = self._log.mask.hide_text(message)
        self._report(ready=False, failure=reason, message=message)
        self._say(message)
        _complain(message)
        self._exit_status = 1 if served else _EX_UNAVAILABLE
        return self._exit_status

    def _drain_output(self) -> None:
        """Read what the engine said last; its relatives are dead, so the pipe ends."""
        deadline_s = time.monotonic() + _DRAIN_S
        while not self._log.closed and time.monotonic() < deadline_s:
            self._loop.wait(deadline_s, None)

    def _say(self, status: str) -> None:
        """The unit's STATUS, when it is new."""
        if status != self._status:
            self._status = status
            self._notifier.status(status)

    def _report(self, *, ready: bool = False, failure: FailureReason | None = None, message: str = "") -> None:
        report = Report(
            invocation=self._invocation,
            definition=self._options.definition,
            endpoint=f"unix:{self._options.socket}" if self._port is None else f"http://127.0.0.1:{self._port}",
            ready=ready,
            load_s=round(self._load_s, 3),
            warm_up_s=round(self._warm_up_s, 3),
            failure=failure,
            message=message,
            tail=self._log.tail if failure else (),
        )
        write_report(self._options, report)


def _complain(message: str) -> None:
    print(f"mmd-runner: {printable(message)}", file=sys.stderr, flush=True)


def _pass_on(line: bytes) -> None:
    """To the journal. A reader that is gone (a restarted journald, a closed terminal) costs the line, not the model."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        pass
