"""Secrets of models as credentials of their units (pure): systemd.exec(5), Credentials.

Environment= would be readable by everybody. Of a credential the unit's text has the file only; systemd reads it with the
manager's rights, and shows the copy to no other unit.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mmd.unitfile import Directive, comment, path

__all__ = ["credential_lines", "secret_options"]


def credential_lines(secrets: Mapping[str, Path]) -> Iterator[Directive]:
    """The directives that give the secrets to a unit, by the names of their variables."""
    # SetCredential= is the default of LoadCredential=, and may not be empty.
    if secrets:
        yield comment(
            "Where a file is missing systemd would fail and not name it: it gives an empty line, and the runner tells."
        )
    for name, file in secrets.items():
        yield "LoadCredential", f"{name}:{path(str(file), setting=f'secrets.{name}')}"
        yield "SetCredential", rf"{name}:\n"


def secret_options(secrets: Mapping[str, Path]) -> Iterator[str]:
    """Options of mmd-runner(8): which credentials become variables, and the files, which its errors name."""
    for name, file in secrets.items():
        yield from ("--secret", f"{name}={file}")
