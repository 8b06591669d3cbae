"""Checking what the tables of one rank say of each other and of its arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import duckdb

from kvtrace import tables
from kvtrace.array_reader import open_array
from kvtrace.database import QUIET, scan
from kvtrace.errors import TraceError
from kvtrace.journal import JournalState
from kvtrace.layout import ARRAYS
from kvtrace.ranks import NUMBERS_PER_RANK

#: Columns whose values, where not null, are keys of another table.
FOREIGN_KEYS = (
    ("models", "model", "requests", "model"),
    ("models", "model", "layers", "model"),
    ("models", "model", "steps", "model"),
    ("runs", "run", "requests", "run"),
    ("runs", "run", "steps", "run"),
    ("steps", "step", "rows", "step"),
    ("requests", "request", "rows", "request"),
    ("requests", "request", "tokens", "request"),
    ("requests", "request", "requests", "encoder_request"),
    ("requests", "request", "forks", "request"),
    ("requests", "request", "forks", "source"),
    ("rows", "row", "tokens", "row"),
    ("layers", "layer", "verifications", "layer"),
)
#: Columns of which no two rows have the same.
KEYS = (
    ("runs", "run"),
    ("models", "model"),
    ("requests", "request"),
    ("steps", "step"),
    ("rows", "row"),
    ("array_catalog", "name"),
)


def check_tables(directory: Path, state: JournalState) -> Iterator[tuple[str, str]]:
    """What does not agree: table, and what is wrong.

    Parameters
    ----------
    directory : pathlib.Path
        A rank's folder whose segments are whole.
    state : JournalState
        What its journal says.
    """
    with duckdb.connect() as connection:
        connection.execute(QUIET)
        connection.execute(tables.ddl())
        for table, names in state.segments.items():
            if table in tables.arrow_schemas() and names:
                rows = scan(table, [directory / name for name in names])
                connection.execute(f"insert into {table} by name {rows}")
        yield from _check_keys(connection)
        yield from _check_foreign_keys(connection)
        yield from _check_rows(connection, state.rows)
        yield from _check_catalog(connection, directory, state)


def _check_keys(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, str]]:
    for table, column in KEYS:
        count, distinct = _one(
            connection, f"select count(*), count(distinct {column}) from {table}"
        )
        if count != distinct:
            yield table, f"{count} rows, but {distinct} different values of {column}"


def _check_foreign_keys(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, str]]:
    for parent, key, table, column in FOREIGN_KEYS:
        count, example = _one(
            connection,
            f"select count(*), min({column}) from {table}"
            f" where {column} is not null and {column} not in (select {key} from {parent})",
        )
        if count:
            yield table, f"{count} rows have a {column} ({example}) that {parent} does not"


def _check_rows(connection: duckdb.DuckDBPyConnection, committed: int) -> Iterator[tuple[str, str]]:
    # Each rank has a range of numbers of its own, so what is checked is where in it they lie.
    count, first, last = _one(
        connection,
        f"select count(*), min(row % {NUMBERS_PER_RANK}), max(row % {NUMBERS_PER_RANK}) from rows",
    )
    if count and (count, first, last) != (committed, 0, committed - 1):
        yield "rows", f"{count} rows from {first} to {last}; {committed} were committed"
    count, example = _one(
        connection,
        "select count(*), min(step) from (select step, any_value(num_tokens) as said,"
        " count(*) as held from steps join rows using (step) group by step) where said <> held",
    )
    if count:
        yield "steps", f"{count} steps ({example}) have another number of tokens than of rows"


def _check_catalog(
    connection: duckdb.DuckDBPyConnection, directory: Path, state: JournalState
) -> Iterator[tuple[str, str]]:
    found = connection.execute("select name, dtype, shape from array_catalog").fetchall()
    for name, dtype, shape in found:
        if state.arrays and name not in state.arrays:
            # Put aside by a repair, with a row of table gaps.
            continue
        try:
            array = open_array(directory / ARRAYS, name, state.arrays)
        except (TraceError, OSError, ValueError) as error:
            yield "array_catalog", f"array {name} cannot be opened: {error}"
            continue
        if (str(array.dtype), list(array.shape[1:])) != (dtype, json.loads(shape)):
            yield (
                "array_catalog",
                f"array {name} is {array.dtype} {list(array.shape[1:])}, not {dtype} {shape}",
            )


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    found = connection.execute(query).fetchone()
    assert found is not None  # noqa: S101 - an aggregate without grouping has one row
    return found
