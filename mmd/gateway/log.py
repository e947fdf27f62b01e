"""The log of the gateway's processes: lines on standard error, which systemd takes to the journal.

What a line says may come from clients, engines and members of mmd-admin. So a message begins with its first line, and each line
more of it is marked: no text can make a line that looks like a message. Names go through `mmd.printable.quoted`.
"""

import logging
import sys

from mmd.printable import printable

__all__ = ["log_to_journal"]

# sd-daemon(3): a line that begins with <N> gets that priority in the journal.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


_MAX_CHARACTERS = 8192
"""Of a message; the last lines of an engine's log are the longest there is."""


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        text = record.getMessage()[:_MAX_CHARACTERS]
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        first, *more = text.splitlines() or [""]
        lines = (first, *(f"| {line}" for line in more))
        return "\n".join(prefix + printable(line) for line in lines)


def log_to_journal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
