"""Processes: spawn in a new session, kill a whole family, reap whatever dies.

os.posix_spawn instead of subprocess: no module to load, vfork speed, and no second opinion on who calls waitpid(2).
"""

import ctypes
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mmd.errors import MmdError

__all__ = ["become_subreaper", "describe_exit", "kill_family", "reap", "signal_group", "spawn"]

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

_KILL_WAIT_S = 2.0
"""A process that SIGKILL does not end by then is stuck in the kernel (a GPU driver, a dead disk): systemd's to deal with."""

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""The interpreter ignores these, and what is ignored stays so across exec(3): the engine gets the defaults back."""


def become_subreaper() -> None:
    """Inherit the orphans of the engine's helper processes, to be able to kill and reap them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spawn(argv: Sequence[str], environment: Mapping[str, str], *, output: int | None) -> int:
    """Start a program, found on `environment`'s PATH, in its own session; stdin is /dev/null, as are stdout and stderr unless
    `output` is given. Returns its process id; MmdError when it cannot be started."""
    to_null = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    actions = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        to_null if output is None else (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    )
    program = _find(argv[0], environment.get("PATH", os.defpath))
    try:
        return os.posix_spawn(
            program, list(argv), environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_IGNORED_BY_PYTHON
        )
    except OSError as error:
        raise MmdError(f"{argv[0]} cannot be started: {error.strerror}") from error


def _find(program: str, path: str) -> str:
    if "/" in program:
        return program
    candidates = (f"{directory or '.'}/{program}" for directory in path.split(":"))
    return next((candidate for candidate in candidates if os.access(candidate, os.X_OK)), program)


def reap() -> list[tuple[int, int]]:
    """(process id, wait status) of every child that has ended and was not reaped yet."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def describe_exit(status: int) -> str:
    """A wait status in words: `exited with status 3`, `was killed by SIGKILL`."""
    code = os.waitstatus_to_exitcode(status)
    return f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal the process group that `leader` started, whatever is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


def kill_family(leader: int) -> None:
    """SIGKILL to the engine's group and to all other descendants, and reap them; returns after 2 s at the latest.

    Only SIGKILL, and to all: vLLM hangs on SIGTERM while it initialises, and outlives its parent (EngineCore keeps the GPU).
    """
    deadline_s = time.monotonic() + _KILL_WAIT_S
    signal_group(leader, signal.SIGKILL)
    while (children := _children()) and time.monotonic() < deadline_s:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
        time.sleep(0.005)


def _children() -> list[int]:
    """This process's children, adopted orphans included, dead or alive (proc(5); nothing where the kernel lacks the file)."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except FileNotFoundError:
        return []
