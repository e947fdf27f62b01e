"""The settings as the body of mmd.yaml(5), in scdoc's syntax (scdoc(5)); `python -m mmd.manual` prints it."""

from mmd.config import EngineKind
from mmd.model_settings import MODEL
from mmd.setting import Entry, Later, Section, Setting, walk
from mmd.settings import TOP

__all__ = ["manual"]


def manual() -> str:
    """Every setting of the table, one section of the page per section."""
    parts = [_manual_section(entry) for entry in TOP.entries.values() if isinstance(entry, Section)]
    parts.append(_manual_section(MODEL, title="models.NAME"))
    return "\n".join(parts)


def _manual_section(section: Section, title: str = "") -> str:
    lines = [f"# SETTINGS: {title or section.key}", "", _escape(section.doc), ""]
    for path, entry in walk(section):
        lines += [f"*{_escape('.'.join(path))}*", f"\t{_manual_entry(entry)}", ""]
    return "\n".join(lines)


def _manual_entry(entry: Entry) -> str:
    if isinstance(entry, Later):
        only = f"; the only value is {entry.only}" if entry.only is not None else ""
        return f"{_escape(entry.doc)} Not yet supported{only}."
    parts = [_escape(entry.doc)]
    if isinstance(entry, Setting):
        parts.append(f"Value: {_escape(entry.kind.noun)}.")
        if entry.default:
            parts.append(f"Default: {_escape(entry.default)}.")
    if entry.engines != frozenset(EngineKind):
        parts.append(f"Engines: {', '.join(sorted(entry.engines))}.")
    return " ".join(parts)


def _escape(text: str) -> str:
    """scdoc reads `_` and `*` as markup and `\\` as the escape."""
    return "".join(f"\\{char}" if char in "_*\\<>#`" else char for char in text)


if __name__ == "__main__":
    print(manual(), end="")
