"""What was learned of the models, in the state directory: a SQLite file with one row per definition.

A row belongs to a definition (its fingerprint), so a model that is defined anew starts without prejudice, and its old row goes.
Losing the file costs nothing but learning again.
"""

from collections.abc import Mapping
from pathlib import Path

from mmd.gateway.book import Book
from mmd.policy.lesson import Lesson

__all__ = ["LessonBook"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lesson (
    definition TEXT PRIMARY KEY, model TEXT NOT NULL, start_s REAL, wake_s REAL, reload_s REAL,
    peak_bytes INTEGER NOT NULL, raised_bytes INTEGER NOT NULL, held_1_bytes INTEGER, held_2_bytes INTEGER
)
"""
_VERSION = 2


class LessonBook(Book):
    def __init__(self, file: Path) -> None:
        super().__init__(file, "lesson", _SCHEMA, version=_VERSION, holds="what is learned of the models")

    def load(self, definitions: Mapping[str, str]) -> dict[str, Lesson]:
        """The lessons of these definitions (fingerprint by model name); those of the models' former definitions are dropped."""
        found = {}
        for model, definition in definitions.items():
            self.execute("DELETE FROM lesson WHERE model = ? AND definition <> ?", model, definition)
            for row in self.execute(
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
        self.execute("REPLACE INTO lesson VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", definition, model, *values, *held)

    def forget(self, model: str) -> None:
        self.execute("DELETE FROM lesson WHERE model = ?", model)
