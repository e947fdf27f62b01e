"""Unit files as systemd reads them (pure): lines, comments, continuations and sections, and nothing of what directives mean.

The writer (mmd.unitfile) holds each unit that it made against this reader, so it shares no code with it. The rules are those of
`config_parse()` in systemd's src/shared/conf-parser.c, the same in 252 and 257, and systemd.syntax(7) for the rest.
"""

import re

__all__ = ["Parsed", "parse_unit"]

Parsed = tuple[str, str, str]
"""Section, key and value; a line without `=` has itself as the key."""

_LINE_END = re.compile("[\n\r\0]")  # read_line() ends a line at each of them
_BLANK = " \t\n\r"  # systemd's WHITESPACE; no other character is one


_KNOWN_MAX = 4096
_KNOWN_CHARACTERS_MAX = 200  # of a line that is remembered

_known: dict[str, tuple[str, str] | None] = {}
"""Key and value of lines that were taken apart before, None for those that hold no directive: most lines of a unit are the same
in every other one, and a hundred units are written at each boot."""


def parse_unit(text: str) -> list[Parsed]:
    """The directives of a unit file in their order. Comments are dropped, continued lines are joined by a blank."""
    found: list[Parsed] = []
    section = pending = ""
    for raw in _LINE_END.split(text):
        if not pending and raw in _known:
            pair = _known[raw]
            if pair is not None:
                found.append((section, *pair))
            continue
        start = raw.lstrip(_BLANK)
        if start.startswith(("#", ";")):  # even in the middle of a continued line, and never continued itself
            continue
        if raw.endswith("\\") and (len(raw) - len(raw.rstrip("\\"))) % 2:
            pending += raw[:-1] + " "
            continue
        line, whole, pending = (pending + raw).strip(_BLANK) if pending else start.rstrip(_BLANK), not pending, ""
        if line.startswith("[") and _is_clean(line):
            section = line[1:-1] if line.endswith("]") else section
            continue
        pair = _directive(line)
        if whole and len(raw) <= _KNOWN_CHARACTERS_MAX and len(_known) < _KNOWN_MAX:
            _known[raw] = pair
        if pair is not None:
            found.append((section, *pair))
    pair = _directive(pending.strip(_BLANK))
    return found if pair is None else [*found, (section, *pair)]


def _directive(line: str) -> tuple[str, str] | None:
    """Key and value of a line; None when there is no directive in it."""
    if not line or line.startswith("[") or not _is_clean(line):
        return None
    key, _, value = line.partition("=")
    return key.rstrip(_BLANK), value.lstrip(_BLANK)


def _is_clean(line: str) -> bool:
    """What systemd's utf8_is_valid() says; it ignores a line that is not clean."""
    if line.isascii():
        return True
    return not any(0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE for code in map(ord, line))
