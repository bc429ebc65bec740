"""Tables of plain text, in the form that Markdown takes, so that they can go into the documentation.

Strategy: a table is a value of strings; figures are made strings by the functions here, one for each kind,
so that the same kind looks the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Table:
    """`notes` stand below it, a line each."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def as_text(table: Table) -> str:
    """The table with its title and notes; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (table.columns, *table.rows)) for column in _indices(table)]
    rule = [("-" * width if number == 0 else "-" * (width - 1) + ":") for number, width in enumerate(widths)]
    lines = [_line(row, widths) for row in (table.columns, rule, *table.rows)]
    return "\n".join([f"## {table.title}", "", *lines, *([""] if table.notes else []), *table.notes, ""])


def seconds(value: float) -> str:
    """`20.0`, or more digits of what is short."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def mib(size: float | None) -> str:
    """Bytes as MiB."""
    if size is None:
        return "–"
    return f"{size / _MIB:.0f}" if size >= 10 * _MIB or size == 0 else f"{size / _MIB:.2f}"


def ratio(value: float | None) -> str:
    """`5.03`."""
    return "–" if value is None else f"{value:.2f}"


def percent(share: float) -> str:
    """0.5 as `50 %`."""
    return f"{share * 100:.0f} %"


def _indices(table: Table) -> range:
    return range(len(table.columns))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if number == 0 else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join([first, *others]) + " |"
