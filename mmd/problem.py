"""What is wrong with a configuration, and where."""

from pathlib import Path
from typing import NamedTuple

from mmd.printable import printable

__all__ = ["Problem"]


class Problem(NamedTuple):
    """One mistake; it prints as `/etc/mmd/mmd.yaml:12: models.tiny.vrma: unknown key (did you mean vram?)`."""

    file: Path
    line: int
    """From 1; 0 when the whole file is meant."""
    key: str
    """The path of the key, joined by dots; empty when the whole file is meant."""
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else f"{self.file}"
        parts = [where, self.key, self.message] if self.key else [where, self.message]
        text = ": ".join(parts) + (f" ({self.hint})" if self.hint else "")
        return printable(text)
