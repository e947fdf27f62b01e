"""How mmdctl ends: exit statuses, and the errors that carry one."""

from enum import IntEnum

from mmd.errors import MmdError

__all__ = ["CtlError", "Exit"]


class Exit(IntEnum):
    """Exit statuses (mmdctl(1), EXIT STATUS). Of several failures in one command the greatest counts."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    """The gateway is down, or may not be asked."""
    NO_SUCH_MODEL = 4
    INTERRUPTED = 130
    """Ctrl-C: 128 + SIGINT, as shells report it."""


class CtlError(MmdError):
    """An expected failure that ends mmdctl with a status of its own."""

    def __init__(self, message: str, *, hint: str = "", exit_code: Exit = Exit.FAILED) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
