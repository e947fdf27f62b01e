"""Errors that say that this process, or the machine, is short of something: never a sign of what the other side does."""

import errno
from typing import Final

__all__ = ["is_shortage"]

_SHORTAGES: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL))
"""open(2), socket(2), connect(2): of descriptors, memory, buffers, local ports."""


def is_shortage(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is a shortage of our own."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES):
            return True
        error = error.__cause__
    return False
