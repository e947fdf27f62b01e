"""The file of API keys on disk: read, and replaced as a whole, by one mmdctl at a time."""

import fcntl
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError
from mmd.keys import KEYS_FILE, KeyRing
from mmd.scope import ScopeKind

__all__ = ["KeyFile"]

_MODE = 0o600
_SIZE_MAX_BYTES = 1_000_000
"""systemd passes on credentials of 1 MiB in all (systemd.exec(5)): with a longer file the gateway would not start again."""
_LOCK_WAIT_S = 30.0
"""Longer than another mmdctl holds the lock while it waits for the gateway's answer."""
_LOCK_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class KeyFile:
    """Every method raises CtlError: where root is needed, with the command to type."""

    path: Path
    kind: ScopeKind

    @classmethod
    def of(cls, context: Context) -> "KeyFile":
        return cls(context.scope.config_dir / KEYS_FILE, context.scope.kind)

    def read(self) -> KeyRing:
        """What is in it, BadKeysError when that is wrong; an empty ring with serial 0 when it does not exist."""
        try:
            return KeyRing.parse(self.path.read_bytes(), self.path)
        except FileNotFoundError:
            return KeyRing()
        except OSError as error:
            raise self._failure(error, "read") from error

    def write(self, ring: KeyRing) -> None:
        """Replaces it. After a crash there is the old file or the new one, on the disk too."""
        text = ring.render().encode()
        if len(text) > _SIZE_MAX_BYTES:
            raise CtlError(f"{self.path}: too many keys for one file", hint="revoke those that nobody uses: mmdctl keys list")
        beside = self.path.with_name(f".{self.path.name}.new")
        try:
            beside.unlink(missing_ok=True)  # what a crash has left: only the holder of the lock writes it
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    os.fchmod(file.fileno(), _MODE)  # whatever the umask says
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self.path)
            except OSError:
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
                raise
            self._sync_directory()
        except OSError as error:
            raise self._failure(error, "written") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other mmdctl from a change. The lock is a file of its own, since the one that it guards is replaced."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise self._failure(error, "written") from error
        try:
            deadline_s = time.monotonic() + _LOCK_WAIT_S
            while not _try_lock(descriptor):
                if time.monotonic() > deadline_s:
                    raise CtlError(f"{self.path}: another mmdctl is changing it", hint=f"fuser -v {shlex.quote(str(lock))}")
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def _sync_directory(self) -> None:
        """The renaming itself (fsync(2): a file's fsync does not cover its name)."""
        descriptor = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _failure(self, error: OSError, done: str) -> CtlError:
        if isinstance(error, PermissionError) and self.kind is ScopeKind.SYSTEM and os.geteuid() != 0:
            return CtlError("only root may see and change the API keys", hint=shlex.join(("sudo", "mmdctl", *sys.argv[1:])))
        hint = f"ls -ld {shlex.quote(str(self.path.parent))} {shlex.quote(str(self.path))}"
        return CtlError(f"{self.path}: cannot be {done}: {error.strerror}", hint=hint)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
