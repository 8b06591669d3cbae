"""Checking trace.duckdb against the segments it was built from."""

from __future__ import annotations

from pathlib import Path

import duckdb

from kvtrace import database, tables
from kvtrace.layout import DATABASE


def check_database(trace: Path) -> str | None:
    """What is wrong with `trace.duckdb`; None where nothing, or where it will be rebuilt anyway.

    Every row of every table is read, and with it every block that a query could use: DuckDB
    compares their checksums.
    """
    if not database.is_fresh(trace):
        return None
    with duckdb.connect() as connection:
        connection.execute(database.QUIET)
        path = str(trace / DATABASE).replace("'", "''")
        try:
            connection.execute(f"attach '{path}' as built (read_only)")
            connection.execute("create schema segments")
            connection.execute("use memory.segments")
            database.create_views(connection, trace)
            for table in tables.arrow_schemas():
                if difference := _compare(connection, table):
                    return difference
        except duckdb.Error as error:
            return " ".join(str(error).split())
    return None


def _compare(connection: duckdb.DuckDBPyConnection, table: str) -> str | None:
    names = ", ".join(column.name for column in tables.columns() if column.table == table)
    sums = []
    for source in ("built.main", "memory.segments"):
        # Segments of an older minor version may lack columns; the view then has fewer.
        query = f"select count(*), sum(hash({_columns(connection, table)})) from {source}.{table}"
        sums.append(connection.execute(query).fetchone())
    if sums[0] != sums[1]:
        return f"table {table} has other rows than its segments ({names})"
    return None


def _columns(connection: duckdb.DuckDBPyConnection, table: str) -> str:
    found = connection.execute(f"describe memory.segments.{table}").fetchall()
    return ", ".join(row[0] for row in found)
