"""The id of a request: the client's own where it is sane, else ours; engines and answers carry it as X-Request-Id."""

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["FIELD", "id_line", "own_line", "without"]

FIELD: Final = b"x-request-id"

# What goes into logs and command lines as it is.
_SANE: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:+=@-]{0,127}")


def id_line(sent: bytes) -> bytes:
    """The field as a line of a head, of what a client sent as its id; b"" when that is none."""
    return b"X-Request-Id: %b\r\n" % sent if _SANE.fullmatch(sent) else b""


def own_line(prefix: bytes, number: int) -> bytes:
    """The same of a number of ours; `prefix` tells processes apart."""
    return b"X-Request-Id: %b%d\r\n" % (prefix, number)


def without(fields: Sequence[tuple[bytes, bytes, bytes]]) -> list[tuple[bytes, bytes, bytes]]:
    return [field for field in fields if field[0] != FIELD]
