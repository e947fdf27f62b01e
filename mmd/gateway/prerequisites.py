"""Why systemd did not even try to start a model's unit: one that it requires has failed (systemd.unit(5), Requires=)."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from mmd.config import Model
from mmd.hub_unit import fetch_unit_name, wanted
from mmd.names import UnitName, model_user
from mmd.scope import Scope
from mmd.systemd.client import Systemd
from mmd.systemd.unit import UnitState

__all__ = ["Prerequisites", "Why"]

_FAILURE_FILE: Final = "failure"  # mmd.hub.fetch
_BYTES: Final = 8192
_LINES: Final = 20


class Why(NamedTuple):
    """What failed, and the last that it said."""

    reason: str
    tail: tuple[str, ...] = ()


class Prerequisites(NamedTuple):
    """The units that model units require: the one that makes their user, the one that fetches their weights."""

    scope: Scope
    systemd: Systemd

    async def failed(self, unit: UnitName, model: Model | None) -> Why | None:
        """What made a start job of `unit` end as `dependency`; None when no required unit says."""
        if model is None:
            return None
        if wanted(model, self.scope):
            name = fetch_unit_name(model.id)
            state = await self.systemd.read(name)
            if state.result != "success":
                lines = _said(self.scope.fetch_dir / model.id, state)
                ended = lines[0] if lines else f"{name} failed ({state.result}): journalctl -u {name}"
                return Why(f"its weights could not be fetched: {ended}", lines[1:])
        if model.user is None:
            name = f"mmd-user@{model_user(unit.id)}.service"
            if (await self.systemd.read(name)).result != "success":
                return Why(f"its user {model_user(unit.id)} could not be made: journalctl -u {name}")
        return None


def _said(directory: Path, state: UnitState) -> tuple[str, ...]:
    """The lines that this run of the fetch left. Its folder belongs to another user, so nothing but a small file is read."""
    with suppress(OSError, ValueError):
        path = directory / _FAILURE_FILE
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return ()
            invocation, _, text = file.read(_BYTES).decode(errors="replace").partition("\n")
        if invocation == state.invocation_id:
            return tuple(text.splitlines()[:_LINES])
    return ()
