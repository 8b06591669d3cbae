"""SQL over a trace: read-only, fenced in, bounded in memory and time."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from kvtrace import database, derived, derived_parts, tables
from kvtrace.errors import QueryError, TraceError

if TYPE_CHECKING:
    from kvtrace.trace import Trace

MEMORY_LIMIT = "2GB"
TIMEOUT_S = 60.0
_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}


def query(
    trace: Trace,
    sql: str,
    *,
    max_rows: int | None = None,
    memory_limit: str = MEMORY_LIMIT,
    timeout_s: float = TIMEOUT_S,
) -> pa.Table:
    """Run one reading statement against a trace.

    Parameters
    ----------
    trace : Trace
        The trace, whatever its rank: tables are of all ranks.
    sql : str
        One SELECT (or DESCRIBE, SHOW, EXPLAIN) in DuckDB's dialect.
    max_rows : int, optional
        Fetch at most this many rows.
    memory_limit : str
        As DuckDB writes it ("2GB").
    timeout_s : float
        Seconds after which the query is interrupted.

    Returns
    -------
    pyarrow.Table

    Raises
    ------
    QueryError
        For a statement that writes, that fails, or that passes a limit.
    TraceError
        Where it names a table that is derived from the arrays, which cannot be kept.
    """
    trace, state = _as_of_now(trace)
    while True:
        with derived_parts.held(trace.path):
            if not derived_asked(sql) or derived.scans(trace.path, state.commits) is not None:
                try:
                    return _run(trace, state, sql, max_rows, memory_limit, timeout_s)
                except (TraceError, duckdb.IOException) as error:
                    if not state.is_replaced():
                        if isinstance(error, TraceError):
                            raise
                        raise QueryError(_one_line(error)) from error
                # Its rows are in other files now.
                trace, state = _as_of_now(trace)
                continue
        # Once, unless another process makes those of a later state at the same moment.
        trace, state = derive(trace)


def _run(
    trace: Trace,
    state: database.State,
    sql: str,
    max_rows: int | None,
    memory_limit: str,
    timeout_s: float,
) -> pa.Table:
    with _connect(trace, state, memory_limit=memory_limit) as connection:
        _check_reading(connection, sql)
        timer = threading.Timer(timeout_s, connection.interrupt)
        timer.start()
        try:
            relation = connection.sql(sql)
            if max_rows is None:
                return relation.to_arrow_table()
            return _first_rows(relation.to_arrow_reader(), max_rows)
        except duckdb.InterruptException as error:
            raise QueryError(
                f"the query ran past its limit of {timeout_s:g} s; a shorter one was expected;"
                " narrow it, or raise --timeout"
            ) from error
        except duckdb.OutOfMemoryException as error:
            raise QueryError(
                f"the query needs more than {memory_limit} of memory; narrow it,"
                " or raise --memory-limit"
            ) from error
        except duckdb.PermissionException as error:
            raise QueryError(
                f"{_one_line(error)}; a query reads its trace and nothing else; take what it finds"
                " out with --format and --out, and join it there"
            ) from error
        except duckdb.IOException:
            raise
        except (duckdb.Error, UnicodeEncodeError) as error:
            raise QueryError(_one_line(error)) from error
        finally:
            timer.cancel()


def row_counts(trace: Trace) -> dict[str, int]:
    """Rows of every recorded table, in the order of schema.sql."""
    names = [one.name for one in tables.catalog() if one.kind == "recorded"]
    parts = [f"select {i} as i, count(*) as rows from {name}" for i, name in enumerate(names)]
    found = query(trace, f"{' union all '.join(parts)} order by i")
    return dict(zip(names, found["rows"].to_pylist(), strict=True))


def derived_asked(sql: str) -> bool:
    """Whether a query names a table that is computed from the arrays, or a view over one."""
    return not tables.derived_names().isdisjoint(re.findall(r"\w+", sql.lower()))


def derive(trace: Trace) -> tuple[Trace, database.State]:
    """Compute the tables that stand on the arrays, unless they are there.

    Returns
    -------
    Trace, State
        The state of the trace that they are of, and the trace opened at it.

    Raises
    ------
    TraceError
        Where they cannot be written.
    """
    trace, state = _as_of_now(trace)
    if derived.scans(trace.path, state.commits) is None:
        with derived.making(trace.path):
            # Another process may have made them, and the trace have grown, while we waited.
            trace, state = _as_of_now(trace)
            derived.make(trace, state.commits)
    return trace, state


def _as_of_now(trace: Trace) -> tuple[Trace, database.State]:
    """What is committed now, and a trace whose functions know those rows."""
    state = database.State(trace.path)
    if trace.closed and trace.state().commits == state.commits:
        return trace, state
    trace = type(trace)(trace.path)
    return trace, trace.state()


def _first_rows(batches: pa.RecordBatchReader, max_rows: int) -> pa.Table:
    kept, count = [], 0
    for batch in batches:
        kept.append(batch.slice(0, max_rows - count))
        count += kept[-1].num_rows
        if count >= max_rows:
            break
    return pa.Table.from_batches(kept, schema=batches.schema)


@contextmanager
def _connect(
    trace: Trace, state: database.State, *, memory_limit: str
) -> Iterator[duckdb.DuckDBPyConnection]:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": memory_limit,
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    try:
        connection = duckdb.connect(config=settings)
    except duckdb.Error as error:
        raise QueryError(
            f"the memory limit {memory_limit!r} was given ({_one_line(error)}); a size was"
            " expected; write 512MB or 4GB"
        ) from error
    with connection:
        connection.execute(database.QUIET)
        if not (trace.closed and _attach(connection, trace.path)):
            database.create_views(connection, trace.path, state)
            # The views read Parquet in place: the trace's own folder is all they may touch.
            folder = str(trace.path.resolve()).replace("'", "''")
            connection.execute(f"set allowed_directories = ['{folder}/']")
        trace.functions.register(connection)
        connection.execute("set enable_external_access = false")
        connection.execute("set lock_configuration = true")
        yield connection


def _attach(connection: duckdb.DuckDBPyConnection, trace: Path) -> bool:
    """Attach `trace.duckdb`, made again where it is stale; False where it cannot be made."""
    try:
        if not database.is_fresh(trace):
            database.build(trace)
        database.attach(connection, trace)
        if not database.is_ours(connection):
            database.detach(connection)
            database.build(trace)
            database.attach(connection, trace)
    except (OSError, duckdb.Error):
        # On a read-only disk, or damaged: the views show the same tables, more slowly.
        return False
    return True


def _check_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        statements = connection.extract_statements(sql)
    except (duckdb.Error, UnicodeEncodeError) as error:
        raise QueryError(_one_line(error)) from error
    if len(statements) != 1:
        raise QueryError(
            f"{len(statements)} statements were given; one was expected; give it in quotes"
        )
    if statements[0].type not in _READING:
        kind = statements[0].type.name
        article = "an" if kind[0] in "AEIOU" else "a"
        raise QueryError(f"{article} {kind} statement was found; a trace is read-only; use SELECT")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split("\n\nLINE")[0].split())
    # What our own functions raise is meant for the user; that they are Python's is not.
    return re.sub(r"^Invalid Input Error: Python exception .*?: InputError: ", "", text)
