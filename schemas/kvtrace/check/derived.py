"""Checking trace.duckdb against the segments it was built from."""

from __future__ import annotations

from pathlib import Path

import duckdb

from kvtrace import database, derived_parts, tables
from kvtrace.layout import DATABASE


def check_database(trace: Path) -> str | None:
    """What is wrong with `trace.duckdb`; None where nothing, or where it will be rebuilt anyway.

    Every row of every table is read, and with it every block that a query could use: DuckDB
    compares their checksums.
    """
    if not database.is_fresh(trace):
        return None
    with derived_parts.held(trace), duckdb.connect() as connection:
        connection.execute(database.QUIET)
        path = str(trace / DATABASE).replace("'", "''")
        try:
            connection.execute(f"attach '{path}' as built (read_only)")
            connection.execute("use built")
            if not database.is_ours(connection):
                return None
            connection.execute("create schema memory.segments")
            connection.execute("use memory.segments")
            database.create_views(connection, trace, database.State(trace))
            for table in (*tables.arrow_schemas(), *tables.DERIVED_TABLES):
                if difference := _compare(connection, table):
                    return difference
        except duckdb.Error as error:
            return " ".join(str(error).split())
    return None


def _compare(connection: duckdb.DuckDBPyConnection, table: str) -> str | None:
    found = connection.execute(f"describe memory.segments.{table}").fetchall()
    columns = ", ".join(row[0] for row in found)
    built, segments = (
        connection.execute(
            f"select count(*), sum(hash({columns})) from {source}.{table}"
        ).fetchone()
        for source in ("built.main", "memory.segments")
    )
    return None if built == segments else f"table {table} has other rows than its segments"
