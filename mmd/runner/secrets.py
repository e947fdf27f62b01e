"""The engine's secrets: read from the unit's credentials, and hidden in what the engine says."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmd.errors import MmdError
from mmd.runner.options import Options

__all__ = ["Mask", "read_secrets"]

_SECRET_BYTES = 64 << 10
"""The kernel takes 128 KiB for a variable (MAX_ARG_STRLEN, execve(2)); no token comes near."""

_MASKED_MIN_BYTES = 8
"""A shorter value, such as `1` or `admin`, occurs in any log: hiding it would spoil the log, and tell the value by where it
stood in words that everybody knows."""

_STARS = b"***"
_BREAK = re.compile(rb"[\r\n]+")


def read_secrets(options: Options, environment: Mapping[str, str]) -> dict[str, str]:
    """The values by the names of their variables, less one final newline each. MmdError when one is missing, or cannot be the
    value of a variable; it names model, key and file."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    return {name: _read(options.model, name, file, folder) for name, file in options.secrets.items()}


def _read(model: str, name: str, file: Path, folder: str | None) -> str:
    key = f"models.{model}.secrets.{name}"
    if folder is None:
        raise MmdError(f"{key}: the unit has no credentials", hint="mmdctl reload")
    try:
        with Path(folder, name).open("rb") as stream:
            value = stream.read(_SECRET_BYTES + 2)
    except OSError as error:
        raise MmdError(f"{key}: the copy of {file} cannot be read: {error.strerror}", hint="mmdctl reload") from error
    value = value.removesuffix(b"\n")
    if not value:
        raise MmdError(f"{key}: {file} is missing or empty", hint=f"write the value into {file}, one line")
    if len(value) > _SECRET_BYTES:
        raise MmdError(f"{key}: {file} is larger than 64 KiB", hint="it must hold one value, which becomes a variable")
    if b"\0" in value:
        raise MmdError(f"{key}: {file} holds a NUL byte, which no variable can", hint="write it as text")
    return os.fsdecode(value)


class Mask:
    """Hides secrets in text that others read: the journal, the unit's status, the report, whose lines clients get."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """Of values of several lines each line is hidden, since output is looked at line by line."""
        pieces = {piece for value in values for piece in _BREAK.split(os.fsencode(value)) if len(piece) >= _MASKED_MIN_BYTES}
        longest_first = sorted(pieces, key=lambda piece: (-len(piece), piece))
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if pieces else None
        self.longest_bytes = len(longest_first[0]) if pieces else 0
        """Where a text is cut, so much before the cut may be the beginning of a secret."""

    def hide(self, text: bytes) -> bytes:
        """The text with stars in place of secrets."""
        return text if self._pattern is None else self._pattern.sub(_STARS, text)

    def hide_text(self, text: str) -> str:
        return os.fsdecode(self.hide(os.fsencode(text)))
