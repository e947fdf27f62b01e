"""Which engines keep which answers, in the state directory: engines outlive the gateway, and so do the answers that they keep.

Written once a second at most: a gateway that is killed forgets the answers of its last second.
"""

import asyncio
from pathlib import Path

from mmd.gateway.book import Book
from mmd.gateway.relay.kept import KEPT_MAX

__all__ = ["AnswerBook"]

_SCHEMA = "CREATE TABLE IF NOT EXISTS answer (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, model TEXT NOT NULL)"
_VERSION = 1
_WRITE_S = 1.0


class AnswerBook(Book):
    def __init__(self, file: Path) -> None:
        super().__init__(file, "answer", _SCHEMA, version=_VERSION, holds="which engine keeps which answer")
        self._unwritten: dict[str, str] = {}
        self._timer: asyncio.TimerHandle | None = None

    def load(self) -> list[tuple[str, str]]:
        """Ids and models, the oldest first."""
        return [(answer, model) for answer, model in self.execute("SELECT id, model FROM answer ORDER BY number")]

    def note(self, answer: str, model: str) -> None:
        """Write it down, soon."""
        self._unwritten[answer] = model
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_S, self.write)

    def write(self) -> None:
        """Now what was noted."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unwritten:
            self.execute_all("REPLACE INTO answer (id, model) VALUES (?, ?)", list(self._unwritten.items()))
            self.execute("DELETE FROM answer WHERE number <= (SELECT MAX(number) FROM answer) - ?", KEPT_MAX)
            self._unwritten.clear()

    def close(self) -> None:
        if self._unwritten:
            self.write()
        super().close()
