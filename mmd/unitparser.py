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


def parse_unit(text: str) -> list[Parsed]:
    """The directives of a unit file in their order. Comments are dropped, continued lines are joined by a blank."""
    found: list[Parsed] = []
    section = pending = ""
    for raw in _LINE_END.split(text):
        start = raw.lstrip(_BLANK)
        if start.startswith(("#", ";")):  # even in the middle of a continued line, and never continued itself
            continue
        if raw.endswith("\\") and (len(raw) - len(raw.rstrip("\\"))) % 2:
            pending += raw[:-1] + " "
            continue
        line, pending = (pending + raw).strip(_BLANK) if pending else start.rstrip(_BLANK), ""
        section = _take(line, section, found)
    _take(pending.strip(_BLANK), section, found)
    return found


def _take(line: str, section: str, found: list[Parsed]) -> str:
    """Add the directive in a line, if there is one; the section that holds from here on."""
    if not line or not _is_clean(line):
        return section
    if line.startswith("["):
        return line[1:-1] if line.endswith("]") else section
    key, _, value = line.partition("=")
    found.append((section, key.rstrip(_BLANK), value.lstrip(_BLANK)))
    return section


def _is_clean(line: str) -> bool:
    """What systemd's utf8_is_valid() says; it ignores a line that is not clean."""
    if line.isascii():
        return True
    return not any(0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE for code in map(ord, line))
