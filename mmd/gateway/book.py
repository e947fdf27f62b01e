"""A SQLite file in the state directory. Losing it costs little: it is written without waiting for the disk, and one that cannot
be read or written is said to be so and done without.
"""

import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Book"]

_log = logging.getLogger(__name__)


class Book:
    """One table."""

    def __init__(self, file: Path, table: str, schema: str, *, version: int, holds: str) -> None:
        """`version` is of the schema, and kept in the file: a file of another version is begun anew. `holds`: for the log."""
        self._holds = holds
        self._database: sqlite3.Connection | None = None
        try:
            self._database = sqlite3.connect(file, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")
            if self._database.execute("PRAGMA user_version").fetchone() != (version,):
                self._database.execute(f"DROP TABLE IF EXISTS {table}")
                self._database.execute(f"PRAGMA user_version = {version}")
            self._database.execute(schema)
        except sqlite3.Error as error:
            self._give_up(error)

    def execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        if self._database is None:
            return []
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def execute_all(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        """Once for each of `rows`, in one transaction."""
        if self._database is None:
            return
        try:
            self._database.execute("BEGIN")
            self._database.executemany(statement, rows)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        _log.warning("%s is not kept: %s", self._holds, error)
        self._let_go()

    def close(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()
