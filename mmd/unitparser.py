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


_SECTIONS_MAX = 16
_KNOWN_MAX = 4096  # lines of each
_KNOWN_CHARACTERS_MAX = 200  # of a line that is remembered

_UNSEEN: Parsed = ("", "", "")

_known: dict[str, dict[str, Parsed | None]] = {}
"""By section: what whole lines that were taken apart before hold, None for those without a directive. Most lines of a unit are
the same in every other one, and a hundred units are written at each boot."""


def parse_unit(text: str) -> list[Parsed]:
    """The directives of a unit file in their order. Comments are dropped, continued lines are joined by a blank."""
    found: list[Parsed] = []
    section = pending = ""
    known = _known.setdefault(section, {})
    for raw in _LINE_END.split(text) if "\r" in text or "\0" in text else text.split("\n"):
        if not pending:
            parsed = known.get(raw, _UNSEEN)
            if parsed is None:
                continue
            if parsed is not _UNSEEN:
                found.append(parsed)
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
            known = _known.setdefault(section, {}) if len(_known) < _SECTIONS_MAX else {}
            continue
        parsed = _directive(section, line)
        if whole and len(raw) <= _KNOWN_CHARACTERS_MAX and len(known) < _KNOWN_MAX:
            known[raw] = parsed
        if parsed is not None:
            found.append(parsed)
    parsed = _directive(section, pending.strip(_BLANK))
    return found if parsed is None else [*found, parsed]


def _directive(section: str, line: str) -> Parsed | None:
    """What a line holds; None when there is no directive in it."""
    if not line or line.startswith("[") or not _is_clean(line):
        return None
    key, _, value = line.partition("=")
    return section, key.rstrip(_BLANK), value.lstrip(_BLANK)


def _is_clean(line: str) -> bool:
    """What systemd's utf8_is_valid() says; it ignores a line that is not clean."""
    if line.isascii():
        return True
    return not any(0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE for code in map(ord, line))
