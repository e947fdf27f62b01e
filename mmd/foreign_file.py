"""Files in directories that somebody less trusted can write: an engine's runtime directory, the ledger of simulated GPUs.

Its owner may put anything in a file's place while we look: a symlink to a file that only we may read, a FIFO (an open of it
waits for a writer, for ever), a device, gigabytes, a file with a lease (fcntl(2), F_SETLEASE: an open of it waits as well).
Nothing here follows a link, waits, or reads more than it was told to.
"""

import os
import stat
from pathlib import Path
from typing import Final

from mmd.errors import MmdError

__all__ = ["open_directory", "open_file", "read_file"]

# O_NONBLOCK: neither a FIFO nor a lease is waited for. On regular files it changes nothing else.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def open_directory(path: Path | str) -> tuple[int, int]:
    """A descriptor of a directory (O_PATH), and its owner's uid; OSError. The directories above it must be trusted."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return descriptor, os.fstat(descriptor).st_uid
    except BaseException:
        os.close(descriptor)
        raise


def open_file(name: Path | str, *, directory: int | None = None, owner: int | None = None) -> int:
    """A descriptor to read a regular file that has this one name and, unless None, this owner; OSError, MmdError."""
    descriptor = os.open(name, _READ, dir_fd=directory)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise MmdError(f"{name} is no regular file")
        if found.st_nlink > 1:  # a hard link shows a file of another directory here
            raise MmdError(f"{name} has {found.st_nlink} names")
        if owner is not None and found.st_uid != owner:
            raise MmdError(f"{name} belongs to user {found.st_uid}, not {owner}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(name: Path | str, *, limit_bytes: int, directory: int | None = None, owner: int | None = None) -> bytes:
    """What a file as in `open_file` holds; OSError, MmdError when it is larger than `limit_bytes`."""
    descriptor = open_file(name, directory=directory, owner=owner)
    try:
        data = b""
        while len(data) <= limit_bytes and (piece := os.read(descriptor, limit_bytes + 1 - len(data))):
            data += piece
    finally:
        os.close(descriptor)
    if len(data) > limit_bytes:
        raise MmdError(f"{name} is larger than {limit_bytes} bytes")
    return data
