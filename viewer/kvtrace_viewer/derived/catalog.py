"""The tables of a trace with their columns, comments and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from kvtrace.tables import ColumnInfo, columns, table_comments
from kvtrace.trace import Trace


@dataclass(frozen=True)
class Table:
    """A table that SQL can ask."""

    name: str
    comment: str
    num_rows: int
    columns: tuple[ColumnInfo, ...]


def tables(trace: Trace) -> list[Table]:
    """Every table, in the order of schema.sql."""
    comments = table_comments()
    order = dict.fromkeys(column.table for column in columns() if column.table in comments)
    counts = trace.sql(
        " union all ".join(
            f"select '{name}' as name, count(*) as rows from {name}" for name in order
        )
    )
    num_rows = dict(zip(counts["name"].to_pylist(), counts["rows"].to_pylist(), strict=True))
    return [
        Table(
            name,
            comments[name],
            num_rows[name],
            tuple(column for column in columns() if column.table == name),
        )
        for name in order
    ]
