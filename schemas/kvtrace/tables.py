"""The tables of a trace: their definitions in schema.sql, as Arrow schemas for writers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import duckdb
import pyarrow as pa

#: Tables of replay results and of what was found out about them; all others are the recording's.
REPLAY_TABLES = (
    "replays",
    "replay_steps",
    "replay_heads",
    "replay_ranks",
    "replay_regrets",
    "replay_wants",
)


@dataclass(frozen=True)
class ColumnInfo:
    """A column as schema.sql defines it."""

    table: str
    name: str
    type: str
    comment: str | None


@cache
def ddl() -> str:
    """Text of schema.sql."""
    return files("kvtrace").joinpath("schema.sql").read_text(encoding="utf-8")


@cache
def views() -> str:
    """Text of views.sql, to be run where the tables are."""
    return files("kvtrace").joinpath("views.sql").read_text(encoding="utf-8")


@cache
def arrow_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every table, in the order of schema.sql."""
    with duckdb.connect() as connection:
        connection.execute(ddl())
        names = connection.execute("select table_name from duckdb_tables()").fetchall()
        return {
            name: connection.sql(f"select * from {name} limit 0").to_arrow_table().schema
            for (name,) in names
        }


@cache
def table_comments() -> dict[str, str]:
    """Comment of every table."""
    with duckdb.connect() as connection:
        connection.execute(ddl())
        found = connection.execute("select table_name, comment from duckdb_tables()").fetchall()
    return {name: comment or "" for name, comment in found}


@cache
def columns() -> tuple[ColumnInfo, ...]:
    """Every column of every table, with its comment."""
    with duckdb.connect() as connection:
        connection.execute(ddl())
        found = connection.execute(
            "select table_name, column_name, data_type, comment from duckdb_columns()"
            " where not internal order by table_oid, column_index"
        ).fetchall()
    return tuple(ColumnInfo(*row) for row in found)


def to_arrow(table: str, values: Mapping[str, Sequence[Any] | Any]) -> pa.Table:
    """Columns of `table` as Arrow; columns not given are null.

    Parameters
    ----------
    table : str
        A name of schema.sql.
    values : mapping of str to sequence
        Equally long lists or 1-D numpy arrays.

    Raises
    ------
    KeyError
        For a table or a column that schema.sql does not define.
    """
    schema = arrow_schemas()[table]
    unknown = set(values) - set(schema.names)
    if unknown:
        raise KeyError(f"table {table} has no column {sorted(unknown)}")
    length = len(next(iter(values.values()))) if values else 0
    return pa.table(
        {
            field.name: pa.array(values[field.name], type=field.type, from_pandas=False)
            if field.name in values
            else pa.nulls(length, type=field.type)
            for field in schema
        },
        schema=schema,
    )
