"""Reads a section of the configuration by the table of settings: values for what is right, a complaint for what is wrong."""

from collections.abc import Mapping
from typing import Any

from mmd.kinds import BadValueError
from mmd.setting import Later, Section, Setting
from mmd.similar import nearest

__all__ = ["Complaint", "read_section"]

Complaint = tuple[tuple[str | int, ...], str, str]
"""Where (the path of the key), what, and a hint."""


_LIST_MAX = 12  # more names than that are no help in one line

# Of one section: a name that is looked up among the known ones takes 0.1 ms, and a section may have 100,000 that are wrong.
_COMPLAINTS_MAX = 100


def read_section(section: Section, raw: Any, path: tuple[str | int, ...], complaints: list[Complaint]) -> dict[str, Any]:
    """The values in `raw` by key, subsections as mappings. What is wrong is left out and added to `complaints`."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        complaints.append((path, "must be a mapping of keys", "write KEY: VALUE lines under it"))
        return {}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if len(complaints) >= _COMPLAINTS_MAX:
            break
        entry = section.entries.get(key, section.others)
        where = (*path, key)
        if isinstance(entry, Setting):
            try:
                if entry is section.others and section.names is not None:
                    section.names.read(key)
                values[key] = entry.kind.read(value)
            except BadValueError as error:
                complaints.append(((*where, *error.path), error.message, error.hint))
        elif isinstance(entry, Section):
            values[key] = read_section(entry, value, where, complaints)
        elif entry is None:
            complaints.append((where, "unknown key", _did_you_mean(key, section.entries)))
        elif not _asks_for_nothing(entry, value):
            complaints.append((where, f"not yet supported: {key}", "remove it"))
    return values


def _asks_for_nothing(entry: Later, value: Any) -> bool:
    return entry.only is not None and not isinstance(value, bool) and bool(value == entry.only)


def _did_you_mean(key: str, entries: Mapping[str, Any]) -> str:
    supported = [name for name, entry in entries.items() if not isinstance(entry, Later)]
    match = nearest(key, supported)
    if match:
        return f"did you mean {match}?"
    return f"known: {', '.join(supported)}" if len(supported) <= _LIST_MAX else "see mmd.yaml(5) for the keys"
