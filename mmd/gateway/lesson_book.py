"""What was learned of the models, in the state directory: a SQLite file with one row per definition.

A row belongs to a definition (its fingerprint), so a model that is defined anew starts without prejudice, and its old row goes.
Losing the file costs nothing but learning again: it is written without waiting for the disk, and one that cannot be read or
written is said to be so and done without.
"""

import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmd.policy.lesson import Lesson

__all__ = ["LessonBook"]

_log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lesson (
    definition TEXT PRIMARY KEY, model TEXT NOT NULL, start_s REAL, wake_s REAL, reload_s REAL,
    peak_bytes INTEGER NOT NULL, raised_bytes INTEGER NOT NULL, held_1_bytes INTEGER, held_2_bytes INTEGER
)
"""
_VERSION = 2  # of the schema, kept in the file (PRAGMA user_version); a file of another version is begun anew


class LessonBook:
    def __init__(self, file: Path) -> None:
        self._database: sqlite3.Connection | None = None
        try:
            self._database = sqlite3.connect(file, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")
            if self._database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                self._database.execute("DROP TABLE IF EXISTS lesson")
                self._database.execute(f"PRAGMA user_version = {_VERSION}")
            self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            self._give_up(error)

    def load(self, definitions: Mapping[str, str]) -> dict[str, Lesson]:
        """The lessons of these definitions (fingerprint by model name); those of the models' former definitions are dropped."""
        found = {}
        for model, definition in definitions.items():
            self._execute("DELETE FROM lesson WHERE model = ? AND definition <> ?", model, definition)
            for row in self._execute(
                "SELECT start_s, wake_s, reload_s, peak_bytes, raised_bytes, held_1_bytes, held_2_bytes FROM lesson "
                "WHERE definition = ?",
                definition,
            ):
                held = {level: size for level, size in ((1, row[5]), (2, row[6])) if size is not None}
                found[model] = Lesson(row[0], row[1], row[2], row[3], row[4], held)
        return found

    def save(self, model: str, definition: str, lesson: Lesson) -> None:
        values = (lesson.start_s, lesson.wake_s, lesson.reload_s, lesson.peak_bytes, lesson.raised_bytes)
        held = (lesson.held_bytes.get(1), lesson.held_bytes.get(2))
        self._execute("REPLACE INTO lesson VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", definition, model, *values, *held)

    def forget(self, model: str) -> None:
        self._execute("DELETE FROM lesson WHERE model = ?", model)

    def _execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        if self._database is None:
            return []
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def _give_up(self, error: sqlite3.Error) -> None:
        _log.warning("what is learned of the models is not kept: %s", error)
        self.close()

    def close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()
