"""Aligned tables that fit the window: on a narrow one the least useful columns go first, then the widest is cut."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmd.ctl.terminal import Colour, Terminal

__all__ = ["Cell", "Column", "table"]

_GAP = "  "
_NARROWEST = 10
"""Columns that an elastic column keeps; less shows nothing of a model's name."""


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    right: bool = False
    elastic: bool = False
    """Its texts may be cut."""
    drop: int = 0
    """The order in which columns are left out of a narrow table, lowest first; 0 stays."""


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    colour: Colour = Colour.PLAIN


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], terminal: Terminal) -> list[str]:
    """The lines of a table, the titles first. A column whose title and cells are all empty is left out."""
    cells = [[Cell(column.title, Colour.BOLD) for column in columns], *rows]
    widths = [max(len(row[index].text) for row in cells) for index in range(len(columns))]
    shown = [index for index, width in enumerate(widths) if width]
    if terminal.width is not None:
        shown = _drop(columns, widths, shown, terminal.width)
        _squeeze(columns, widths, shown, terminal.width)
    return [_line(columns, row, widths, shown, terminal) for row in cells]


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[index] for index in shown) + len(_GAP) * (len(shown) - 1)


def _least(columns: Sequence[Column], widths: Sequence[int], shown: Sequence[int]) -> int:
    """The width of the table when its elastic columns are as narrow as they may be."""
    return _total([min(width, _NARROWEST) if columns[i].elastic else width for i, width in enumerate(widths)], shown)


def _drop(columns: Sequence[Column], widths: Sequence[int], shown: list[int], width: int) -> list[int]:
    for index in sorted((index for index in shown if columns[index].drop), key=lambda index: columns[index].drop):
        if _least(columns, widths, shown) <= width:
            break
        shown = [other for other in shown if other != index]
    return shown


def _squeeze(columns: Sequence[Column], widths: list[int], shown: Sequence[int], width: int) -> None:
    """Narrows the elastic columns, the rightmost first, until the table fits."""
    for index in reversed([index for index in shown if columns[index].elastic]):
        excess = _total(widths, shown) - width
        if excess > 0:
            widths[index] = max(widths[index] - excess, min(widths[index], _NARROWEST))


def _line(
    columns: Sequence[Column], row: Sequence[Cell], widths: Sequence[int], shown: Sequence[int], terminal: Terminal
) -> str:
    parts = []
    for index in shown:
        text = terminal.fit(row[index].text, widths[index])
        padding = " " * (widths[index] - len(text))
        painted = terminal.paint(text, row[index].colour)
        parts.append(padding + painted if columns[index].right else painted + padding)
    return _GAP.join(parts).rstrip()
