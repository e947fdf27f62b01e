"""Which instances sleep, and how deep: the one fact that neither systemd nor the engine can tell after a restart.

An engine says whether it sleeps, not at which level; waking it from level 2 without reloading its weights gives garbage
(engines.md). The level is kept in the gateway's runtime directory, which outlives the gateway (RuntimeDirectoryPreserve=yes),
keyed by the unit's InvocationID, so that what was noted of an earlier run of the unit never counts.
"""

import json
import logging
from pathlib import Path

from mmd.names import UnitName

__all__ = ["Sleepers"]

_log = logging.getLogger(__name__)

# Waking with the level 2 sequence is right for level 1 too, only slower: the safe guess.
_UNKNOWN_LEVEL = 2


class Sleepers:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._levels: dict[str, int] = self._read()
        """Sleep level by `unit/invocation`."""

    def level(self, unit: UnitName, invocation: str) -> int:
        """The level that a sleeping instance was put to sleep at."""
        return self._levels.get(f"{unit}/{invocation}", _UNKNOWN_LEVEL)

    def note(self, unit: UnitName, invocation: str, level: int) -> None:
        """Remember a level; 0: awake, or gone."""
        self._levels = {key: value for key, value in self._levels.items() if not key.startswith(f"{unit}/")}
        if level:
            self._levels[f"{unit}/{invocation}"] = level
        self._write()

    def _read(self) -> dict[str, int]:
        try:
            raw = json.loads(self._file.read_text())
            return {str(key): int(level) for key, level in raw.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            _log.warning("%s: %s; sleeping models will be woken as from level 2", self._file, error)
            return {}

    def _write(self) -> None:
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(json.dumps(self._levels))
            draft.replace(self._file)
        except OSError as error:
            _log.warning("%s: %s; after a restart sleeping models will be woken as from level 2", self._file, error)
