"""Text of others, made fit for a log or a terminal (pure).

Engines, clients and members of mmd-admin choose text that ends in log lines and on terminals: escape sequences would drive the
terminal (console_codes(4)), line ends would make lines that look like others, and direction marks (Unicode, Bidi_Control) would
reorder a line.
"""

import re

__all__ = ["printable", "quoted"]

_PLAIN = re.compile(r"[A-Za-z0-9._:/@+=*-]{1,200}")
_QUOTED_MAX = 200


def printable(text: str) -> str:
    r"""`text` with everything that does not print, line ends among it, as an escape such as `\n`, `\x1b`, `\u202e`."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def quoted(name: str) -> str:
    """A name for a log line: as it is when it cannot be taken for anything else, else in quotes, cut to 200 characters."""
    if _PLAIN.fullmatch(name):
        return name
    text = name if len(name) <= _QUOTED_MAX else name[:_QUOTED_MAX] + "..."
    return printable(repr(text))
