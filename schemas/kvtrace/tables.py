"""The tables of a trace: their definitions in SQL, as Arrow schemas for writers.

schema.sql defines what is recorded, derived.sql what is computed from its arrays, views.sql the
views over both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import duckdb
import pyarrow as pa

#: Tables of results (replays, what was found out about them, what-ifs); all others are the
#: recording's.
REPLAY_TABLES = (
    "replays",
    "replay_steps",
    "replay_heads",
    "replay_ranks",
    "replay_gaps",
    "replay_regrets",
    "replay_wants",
    "certificates",
    "certificate_steps",
    "certificate_events",
    "tier_runs",
    "tier_levels",
    "tier_steps",
    "tier_transfers",
    "tier_occupancy",
    "tier_tokens",
    "tier_blocks",
    "tier_moves",
    "block_runs",
    "allocation_runs",
    "allocation_steps",
    "allocation_requests",
    "allocation_blocks",
)

#: Tables computed from the arrays; derived.sql also says what made trace.duckdb.
DERIVED_TABLES = ("request_tokens", "head_attention", "key_attention")


@dataclass(frozen=True)
class ColumnInfo:
    """A column as schema.sql defines it."""

    table: str
    name: str
    type: str
    comment: str | None


@dataclass(frozen=True)
class TableInfo:
    """A table or a view.

    Attributes
    ----------
    name : str
        Its name.
    kind : str
        recorded, derived (computed from the arrays when first asked for) or view.
    comment : str
        What it holds.
    columns : tuple of ColumnInfo
        In order.
    """

    name: str
    kind: str
    comment: str
    columns: tuple[ColumnInfo, ...]


def _text(name: str) -> str:
    return files("kvtrace").joinpath(name).read_text(encoding="utf-8")


@cache
def ddl() -> str:
    """Text of schema.sql: the recorded tables."""
    return _text("schema.sql")


@cache
def derived_ddl() -> str:
    """Text of derived.sql: tables computed from the arrays."""
    return _text("derived.sql")


def digest(*definitions: str) -> str:
    """What tells definitions from those of another version; by default all of them."""
    text = "".join(definitions or (ddl(), derived_ddl(), views()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def views() -> str:
    """Text of views.sql, to be run where the tables are."""
    return _text("views.sql")


@cache
def arrow_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every recorded table, in the order of schema.sql."""
    return _schemas(ddl())


@cache
def derived_schemas() -> dict[str, pa.Schema]:
    """Arrow schema of every table of derived.sql, in its order."""
    return _schemas(derived_ddl())


def _schemas(definitions: str) -> dict[str, pa.Schema]:
    with duckdb.connect() as connection:
        connection.execute(definitions)
        names = connection.execute("select table_name from duckdb_tables()").fetchall()
        return {
            name: connection.sql(f"select * from {name} limit 0").to_arrow_table().schema
            for (name,) in names
        }


@cache
def catalog() -> tuple[TableInfo, ...]:
    """Every table and view that SQL can ask: recorded, derived, views, each in its file's order."""
    with duckdb.connect() as connection:
        for text in (ddl(), derived_ddl(), views()):
            connection.execute(text)
        named = connection.execute(
            "select table_name, comment, false from duckdb_tables() where not internal union all"
            " select view_name, comment, true from duckdb_views() where not internal"
        ).fetchall()
        described = connection.execute(
            "select table_name, column_name, data_type, comment from duckdb_columns()"
            " where not internal order by table_oid, column_index"
        ).fetchall()
    by_table: dict[str, list[ColumnInfo]] = {}
    for row in described:
        by_table.setdefault(row[0], []).append(ColumnInfo(*row))
    return tuple(
        TableInfo(
            name,
            "view" if is_view else "derived" if name in DERIVED_TABLES else "recorded",
            comment or "",
            tuple(by_table[name]),
        )
        for name, comment, is_view in sorted(named, key=lambda row: list(by_table).index(row[0]))
    )


@cache
def derived_names() -> frozenset[str]:
    """Names of the tables computed from the arrays, and of the views that stand on them."""
    found = set(DERIVED_TABLES)
    for name, text in _view_texts().items():
        if found & set(re.findall(r"\w+", text)):
            found.add(name)
    return frozenset(found)


def _view_texts() -> dict[str, str]:
    """By name what follows CREATE VIEW; a view stands below those that it reads."""
    parts = re.split(r"^CREATE VIEW (\w+)", views(), flags=re.MULTILINE)[1:]
    texts = (text.partition("COMMENT ON")[0] for text in parts[1::2])
    return dict(zip(parts[::2], texts, strict=True))


@cache
def table_comments() -> dict[str, str]:
    """Comment of every recorded table."""
    with duckdb.connect() as connection:
        connection.execute(ddl())
        found = connection.execute("select table_name, comment from duckdb_tables()").fetchall()
    return {name: comment or "" for name, comment in found}


@cache
def columns() -> tuple[ColumnInfo, ...]:
    """Every column of every recorded table, with its comment."""
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
