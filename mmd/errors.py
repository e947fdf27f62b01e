"""The exceptions of mmd: one root, so that a program can turn any expected failure into one readable line."""

__all__ = ["MmdError"]


class MmdError(Exception):
    """An expected failure.

    `message` names what is wrong (file, key, value); `hint`, when there is one, is the next thing to type or to change.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
