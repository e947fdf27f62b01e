"""The memory of simulated GPUs: a directory that every simulated engine of a machine shares.

One file is one allocation on one GPU, and whoever owns it keeps it locked (flock(2)) while it lives. So a killed engine's
memory is free at once, as a real GPU's is, whatever killed it, and no process id is ever trusted. The rules:

- A file is written and locked under a temporary name and then renamed: what is visible is whole and locked.
- To ask whether the owner lives, take a *shared* lock without waiting: two who ask at the same time do not disturb each other.
- `.lock` makes changes exclusive and readings consistent. It is held for a few file operations, never while waiting.
- Whoever changes something also removes what dead owners left. A reader changes nothing and needs read access only.

The directory belongs to all simulated engines, any of which may be hostile. A reader (the gateway) waits for none of them,
reads a bounded amount (mmd.foreign_file), and passes over what is no allocation.
"""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from mmd.errors import MmdError
from mmd.foreign_file import open_file
from mmd.shortage import is_shortage

__all__ = ["HOST", "Allocation", "Claim", "Ledger", "OutOfMemoryError"]

HOST = -1
"""The machine's memory, in the place of a GPU's index."""

_LOCK_FILE = ".lock"
_NEW_PREFIX = ".new-"
_FILE_MODE = 0o660  # engines write under the unit's umask; the directory's group (setgid) is theirs and the gateway's
_DIRECTORY_MODE = 0o2770

_FILE_MAX_BYTES = 4096
_FILES_MAX = 4096
"""No machine has more engines times GPUs; a reader that went through whatever number of files would stand still."""
_OWNER_MAX = 200
_NUMBER_MAX = 1 << 62

_LOCK_WAIT_S = 2.0
"""The lock is held for well under a millisecond; longer means that its holder was stopped (SIGSTOP)."""


class OutOfMemoryError(MmdError):
    """An allocation does not fit."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one process holds on one GPU."""

    gpu: int
    bytes: int
    owner: str
    """For people: a model's name."""
    pid: int
    """As NVML tells it; says who holds the memory, never whether it is alive."""


class Claim:
    """One process's memory on its GPUs, as long as the process lives or until `release`. Made by `Ledger.claim`."""

    def __init__(self, ledger: "Ledger", *, owner: str, totals: Mapping[int, int]) -> None:
        self._ledger = ledger
        self._owner = owner
        self._totals = dict(totals)
        self._name = secrets.token_hex(8)
        self._files: dict[int, int] = {}

    def resize(self, size_bytes: int) -> None:
        """Hold `size_bytes` on every GPU from now on, all or nothing; OutOfMemoryError when one is too full."""
        with self._ledger._exclusive() as others:
            used = dict.fromkeys(self._totals, 0)
            for path, allocation in others.items():
                if allocation.gpu in used and not path.name.endswith(self._name):
                    used[allocation.gpu] += allocation.bytes
            for gpu, total_bytes in self._totals.items():
                free_bytes = total_bytes - used[gpu]
                if size_bytes > free_bytes:
                    where = "the host" if gpu == HOST else f"GPU {gpu}"
                    raise OutOfMemoryError(
                        f"{where} has {free_bytes} of {total_bytes} bytes free; {self._owner} needs {size_bytes}"
                    )
            for gpu in self._totals:
                self._replace(gpu, size_bytes)

    def release(self) -> None:
        """Free everything. The claim may be resized again later."""
        with self._ledger._exclusive():
            for gpu in list(self._files):
                self._replace(gpu, 0)

    def _replace(self, gpu: int, size_bytes: int) -> None:
        path = self._ledger.directory / f"gpu{gpu}-{self._name}"
        old = self._files.pop(gpu, None)
        if size_bytes > 0:
            allocation = Allocation(gpu=gpu, bytes=size_bytes, owner=self._owner, pid=os.getpid())
            self._files[gpu] = _write_locked(path, json.dumps(asdict(allocation)))
        else:
            path.unlink(missing_ok=True)
        if old is not None:
            os.close(old)  # only now: the new file has taken the old one's name


class Ledger:
    """The allocations in `directory`, which must exist before it is read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self) -> None:
        """Make the directory, for a simulated engine that is started by hand; systemd-tmpfiles makes the machine's."""
        if not self.directory.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(_DIRECTORY_MODE)

    def claim(self, size_bytes: int, *, owner: str, totals: Mapping[int, int]) -> Claim:
        """Allocate `size_bytes` on each GPU of `totals` (index -> total bytes), all or nothing; OutOfMemoryError."""
        claim = Claim(self, owner=owner, totals=totals)
        claim.resize(size_bytes)
        return claim

    def read(self) -> tuple[Allocation, ...]:
        """What living processes hold at one moment. Blocks for a moment; MmdError when the ledger stays locked."""
        with self._locked(fcntl.LOCK_SH):
            return tuple(self._living().values())

    @contextmanager
    def _exclusive(self) -> Iterator[dict[Path, Allocation]]:
        """The ledger to oneself and swept; yields the living allocations by file."""
        with self._locked(fcntl.LOCK_EX):
            living = self._living()
            for path in self.directory.iterdir():
                if path.name != _LOCK_FILE and path not in living:
                    with suppress(OSError):  # a directory, or another engine's own: it holds nothing
                        path.unlink()
            yield living

    @contextmanager
    def _locked(self, operation: int) -> Iterator[None]:
        try:
            lock = self._open_lock(operation)
        except FileNotFoundError:
            if operation == fcntl.LOCK_SH:  # nothing was ever allocated here
                yield
                return
            raise MmdError(f"{self.directory} does not exist", hint="systemd-tmpfiles --create") from None
        try:
            _lock_within(lock, operation, self.directory / _LOCK_FILE)
            yield
        finally:
            os.close(lock)

    def _open_lock(self, operation: int) -> int:
        path = self.directory / _LOCK_FILE
        if operation == fcntl.LOCK_SH:
            return open_file(path)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _FILE_MODE)

    def _living(self) -> dict[Path, Allocation]:
        paths = islice(self.directory.glob("gpu*"), _FILES_MAX) if self.directory.is_dir() else ()
        found = ((path, _read_if_alive(path)) for path in paths)
        return {path: allocation for path, allocation in found if allocation is not None}


def _lock_within(lock: int, operation: int, path: Path) -> None:
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise MmdError(f"{path} has been locked for {_LOCK_WAIT_S:g} s", hint=f"fuser -v {path}") from None
            time.sleep(0.001)
        else:
            return


def _read_if_alive(path: Path) -> Allocation | None:
    """The allocation in `path`, or None when its owner is gone, or it is none. OSError when we are short of something."""
    try:
        file = open_file(path)
    except MmdError:
        return None
    except OSError as error:
        if is_shortage(error):
            raise
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _parse(os.read(file, _FILE_MAX_BYTES))
    finally:
        os.close(file)
    return None


def _parse(text: bytes) -> Allocation | None:
    try:
        raw = json.loads(text)
        gpu, size, pid, owner = raw["gpu"], raw["bytes"], raw["pid"], raw["owner"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = all(type(number) is int for number in (gpu, size, pid))
    if not (numbers and isinstance(owner, str) and gpu >= HOST and 0 <= size <= _NUMBER_MAX and 0 <= pid <= _NUMBER_MAX):
        return None
    return Allocation(gpu, size, owner[:_OWNER_MAX], pid)


def _write_locked(path: Path, text: str) -> int:
    """Put a file that this process keeps locked at `path`, in one step; the descriptor that holds the lock."""
    new = path.with_name(f"{_NEW_PREFIX}{path.name}")
    file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, text.encode())
    new.rename(path)
    return file
