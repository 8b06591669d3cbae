"""The tables, views and functions that SQL can ask of a trace, with comments and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from kvtrace.functions import FUNCTIONS
from kvtrace.sql import row_counts
from kvtrace.tables import ColumnInfo, catalog
from kvtrace.trace import Trace


@dataclass(frozen=True)
class Table:
    """A table, a view or a function.

    Attributes
    ----------
    name
        Its name; of a function how it is called.
    kind
        view, derived, recorded or function.
    comment
        What it holds or gives.
    num_rows
        Of recorded tables; those of others would have to be computed.
    columns
        Of tables and views.
    """

    name: str
    kind: str
    comment: str
    num_rows: int | None
    columns: tuple[ColumnInfo, ...]


def tables(trace: Trace) -> list[Table]:
    """Views first, then functions and tables, each in the order of its definition."""
    counts = row_counts(trace)
    found = [
        Table(one.name, one.kind, one.comment, counts.get(one.name), one.columns)
        for one in catalog()
    ]
    found += [Table(one.signature, "function", one.comment, None, ()) for one in FUNCTIONS]
    order = ("view", "function", "derived", "recorded")
    return sorted(found, key=lambda one: order.index(one.kind))
