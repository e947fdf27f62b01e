"""Why systemd did not even try to start a model's unit: one that it requires has failed (systemd.unit(5), Requires=).

The gateway may ask for model units only. What fetches weights leaves a file with its reason (mmd.hub.fetch).
"""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from mmd.config import Model
from mmd.hub_unit import fetch_unit_name, wanted
from mmd.names import model_user
from mmd.scope import Scope

__all__ = ["Why", "why_not_started"]

_FAILURE_FILE: Final = "failure"
_BYTES: Final = 8192
_LINES: Final = 20


class Why(NamedTuple):
    """What failed, and the last that it said."""

    reason: str
    tail: tuple[str, ...] = ()


def why_not_started(scope: Scope, model: Model | None, since: float) -> Why | None:
    """What made a start job end as `dependency`, which began at `since` (Unix seconds)."""
    if model is None:
        return None
    user = model_user(model.id, private=model.is_private)
    units = [f"mmd-user@{user}.service"] if model.user is None else []
    if wanted(model, scope):
        lines = _said(scope.fetch_dir / model.id, since)
        if lines:
            return Why(f"its weights could not be fetched: {lines[0]}", lines[1:])
        units.append(fetch_unit_name(model.id))
    return Why("a unit that it requires has failed: journalctl " + " ".join(f"-u {unit}" for unit in units)) if units else None


def _said(directory: Path, since: float) -> tuple[str, ...]:
    """The lines that a fetch left. Its folder belongs to another user, so nothing but a small file is read."""
    with suppress(OSError, ValueError):
        path = directory / _FAILURE_FILE
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_mtime < since - 1:  # the clock of files is a few ms behind
                return ()
            return tuple(file.read(_BYTES).decode(errors="replace").splitlines()[:_LINES])
    return ()
