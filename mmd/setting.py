"""What a setting is: the shapes that the table of settings (mmd.settings, mmd.model_settings) is made of."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmd.config import EngineKind
from mmd.kinds import Kind

__all__ = ["Entry", "Later", "Section", "Setting", "by_key", "walk"]


class Setting(NamedTuple):
    """A key with a value."""

    key: str
    kind: Kind
    default: str
    """As in YAML; empty when there is none."""
    doc: str
    field: str = ""
    """Its name in mmd.config; the key when that is the same."""
    engines: frozenset[EngineKind] = frozenset(EngineKind)
    """The engines that it applies to."""


class Later(NamedTuple):
    """A key of the format that this version does not support; it is rejected by name, never ignored."""

    key: str
    doc: str
    only: Any = None
    """The one value that is fine, since it asks for nothing."""


class Section(NamedTuple):
    """A key with a mapping of keys."""

    key: str
    doc: str
    entries: Mapping[str, "Entry"]
    make: type[Any] | None = None
    """The class in mmd.config; None: its settings belong to the class around it."""
    others: Setting | None = None
    """For every other key, where people choose the names."""
    names: Kind | None = None
    engines: frozenset[EngineKind] = frozenset(EngineKind)


Entry = Setting | Later | Section


def by_key(*entries: Entry) -> dict[str, Entry]:
    return {entry.key: entry for entry in entries}


def walk(section: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Entry]]:
    """Every key below `section` with its path, sections before what is in them."""
    for entry in (*section.entries.values(), *((section.others,) if section.others else ())):
        yield (*path, entry.key), entry
        if isinstance(entry, Section):
            yield from walk(entry, (*path, entry.key))
