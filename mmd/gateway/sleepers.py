"""Which instances sleep, how deep and since when: what neither systemd nor the engine can tell after a restart.

An engine says whether it sleeps, not at which level; waking it from level 2 without reloading its weights gives garbage
(engines.md). This is kept in the gateway's runtime directory, which outlives the gateway (RuntimeDirectoryPreserve=yes),
keyed by the unit's InvocationID, so that what was noted of an earlier run of the unit never counts.
"""

import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

from mmd.names import UnitName

__all__ = ["Sleepers"]

_log = logging.getLogger(__name__)

# Waking with the level 2 sequence is right for level 1 too, only slower: the safe guess.
_UNKNOWN_LEVEL = 2


class _Nap(NamedTuple):
    level: int
    since: float
    """Unix seconds."""


class Sleepers:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._naps: dict[str, _Nap] = self._read()
        """By `unit/invocation`."""

    def level(self, unit: UnitName, invocation: str) -> int:
        """The level that a sleeping instance was put to sleep at."""
        nap = self._naps.get(f"{unit}/{invocation}")
        return nap.level if nap else _UNKNOWN_LEVEL

    def noted(self, unit: UnitName, invocation: str) -> int:
        """The level noted for an instance, 0 when none is: it was awake when we last knew."""
        nap = self._naps.get(f"{unit}/{invocation}")
        return nap.level if nap else 0

    def since(self, unit: UnitName, invocation: str) -> float | None:
        """When it was put to sleep, in Unix seconds; None when nobody noted it."""
        nap = self._naps.get(f"{unit}/{invocation}")
        return nap.since if nap else None

    def note(self, unit: UnitName, invocation: str, level: int) -> None:
        """Remember a level, from now on; 0: awake, or gone."""
        self._naps = {key: nap for key, nap in self._naps.items() if not key.startswith(f"{unit}/")}
        if level:
            self._naps[f"{unit}/{invocation}"] = _Nap(level, time.time())
        self._write()

    def _read(self) -> dict[str, _Nap]:
        try:
            raw = json.loads(self._file.read_text())
            return {str(key): _Nap(int(level), float(since)) for key, (level, since) in raw.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("%s: %s; sleeping models will be woken as from level 2", self._file, error)
            return {}

    def _write(self) -> None:
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(json.dumps(self._naps))
            draft.replace(self._file)
        except OSError as error:
            _log.warning("%s: %s; after a restart sleeping models will be woken as from level 2", self._file, error)
