"""trace.duckdb: the tables of a trace as one DuckDB file, and the views of an open trace.

The file is derived: built when a trace is closed, or by the first reader that finds it missing or
older than what it was made from. A process that holds a DuckDB file for writing locks all others
out, so it is made beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb

from kvtrace import derived, derived_parts, tables
from kvtrace.layout import DATABASE, JOURNAL, REPLAYS, WHATIFS, rank_number
from kvtrace.store import StoreReader
from kvtrace.version import __version__

#: What takes DuckDB more than two seconds would draw a bar on standard output, into our JSON.
QUIET = "set enable_progress_bar = false"
#: What a build keeps in memory; DuckDB would take most of the machine's for a long trace.
BUILD_MEMORY = "64MB"


class State:
    """What was committed at some moment: what the stores of the ranks knew then.

    Parameters
    ----------
    trace : pathlib.Path
        The trace directory.
    stores : mapping of int to StoreReader, optional
        The stores of the recording processes; default: read now. What they learn later is left
        out, but for replays, which come whole.

    Attributes
    ----------
    commits : dict of int to int
        How many by rank: what tells one state of a trace from another. A commit without rows may
        shorten a request.
    """

    def __init__(self, trace: Path, stores: Mapping[int, StoreReader] | None = None) -> None:
        self._trace = trace
        self._stores = stores_by_rank(trace) if stores is None else stores
        self._counts = {
            rank: {name: len(files) for name, files in store.state.segments.items()}
            for rank, store in self._stores.items()
        }
        self.commits = {rank: store.state.commits for rank, store in self._stores.items()}
        self._results: list[StoreReader] = []

    def segments(self) -> dict[str, list[Path]]:
        """Files of every table, in the order of schema.sql.

        Raises
        ------
        TraceError
            Where one is not what was written.
        """
        self._results = replay_parts(self._trace)
        return {
            name: [path for store in self._results for path in store.segments(name)]
            if name in tables.REPLAY_TABLES
            else [
                path
                for rank, store in self._stores.items()
                for path in store.segments(name)[: self._counts[rank].get(name, 0)]
            ]
            for name in tables.arrow_schemas()
        }

    def is_replaced(self) -> bool:
        """Whether files of `segments` may be gone: a rank was compacted, a replay made anew."""
        return any(store.is_replaced() for store in (*self._stores.values(), *self._results))


def stores_by_rank(trace: Path) -> dict[int, StoreReader]:
    """The stores of the recording processes, by their numbers."""
    found = {rank_number(path.parent.name): path.parent for path in _journals(trace)}
    return {rank: StoreReader(found[rank]) for rank in sorted(found)}


def _journals(trace: Path) -> list[Path]:
    return list(trace.glob(f"rank-*/{JOURNAL}"))


def replay_stores(trace: Path) -> list[StoreReader]:
    """The stores of the replays, by name; one that is being written is not there yet."""
    return [StoreReader(path.parent) for path in sorted(_replay_journals(trace))]


def replay_parts(trace: Path) -> list[StoreReader]:
    """The stores of all results: replays, what was found out about each afterwards, and what-ifs.

    What was found out lies in folders inside the replay's own, so that it goes where the replay
    is replaced.
    """
    inside = trace.glob(f"{REPLAYS}/[!.]*/[!.]*/{JOURNAL}")
    found = sorted([*_replay_journals(trace), *inside, *_whatif_journals(trace)])
    return [StoreReader(path.parent) for path in found]


def _replay_journals(trace: Path) -> list[Path]:
    return list(trace.glob(f"{REPLAYS}/[!.]*/{JOURNAL}"))


def _whatif_journals(trace: Path) -> list[Path]:
    return list(trace.glob(f"{WHATIFS}/[!.]*/{JOURNAL}"))


def build(trace: Path) -> None:
    """Make `trace.duckdb` from the committed segments."""
    try:
        _build(trace, {"memory_limit": BUILD_MEMORY})
    except duckdb.OutOfMemoryException:
        # A single row may be larger than that: then as much as it takes.
        _build(trace, {})


def _build(trace: Path, limits: dict[str, Any]) -> None:
    final = trace / DATABASE
    # Threads of a viewer may all find it stale at once: each makes its own.
    temporary = final.with_name(f".{DATABASE}.{os.getpid()}.{threading.get_ident()}")
    spilled = temporary.with_name(f"{temporary.name}.spilled")
    made_from = _changed_ns(trace)
    temporary.unlink(missing_ok=True)
    config = limits | {
        # Each thread has buffers of its own to fit into it.
        "threads": min(4, os.cpu_count() or 1),
        "temp_directory": str(spilled),
    }
    with duckdb.connect(config=config) as connection:
        connection.execute(QUIET)
        # Small blocks: a table takes whole blocks, and a short trace would be mostly air. The old
        # storage version lets clients of DuckDB 1.x open the file too.
        path = str(temporary).replace("'", "''")
        connection.execute(f"attach '{path}' as built (block_size 16384, storage_version 'v1.0.0')")
        connection.execute("use built")
        connection.execute(tables.ddl())
        for name, files in State(trace).segments().items():
            if files:
                connection.execute(f"insert into {name} by name {scan(name, files)}")
        connection.execute(tables.derived_ddl())
        with derived_parts.held(trace):
            for name, select in (derived.scans(trace, State(trace).commits) or {}).items():
                connection.execute(f"insert into {name} by name {select}")
        made = [__version__, tables.digest()]
        connection.execute("insert into trace_database values (?, ?)", made)
        connection.execute(tables.views())
    shutil.rmtree(spilled, ignore_errors=True)
    # Dated by what it was made from, not by when: what came during the build makes it stale.
    os.utime(temporary, ns=(made_from, made_from))
    temporary.replace(final)


def is_fresh(trace: Path) -> bool:
    """Whether `trace.duckdb` is there and nothing it was made from is newer.

    Whether this version made it, only its table `trace_database` says.
    """
    try:
        return (trace / DATABASE).stat().st_mtime_ns >= _changed_ns(trace)
    except FileNotFoundError:
        return False


def _changed_ns(trace: Path) -> int:
    """When the recording, its replays, what is known of one, or what is derived last changed."""
    results = [path.parent for path in (*_replay_journals(trace), *_whatif_journals(trace))]
    folders = [trace / REPLAYS, trace / WHATIFS, trace / derived_parts.DIRECTORY]
    sources = [*folders, *results, *_journals(trace)]
    return max((path.stat().st_mtime_ns for path in sources if path.exists()), default=0)


def attach(connection: duckdb.DuckDBPyConnection, trace: Path) -> None:
    """Let a connection read `trace.duckdb`, its tables under their plain names."""
    path = str((trace / DATABASE).resolve()).replace("'", "''")
    connection.execute(f"attach '{path}' as trace (read_only)")
    connection.execute("use trace")


def detach(connection: duckdb.DuckDBPyConnection) -> None:
    """Let go of it."""
    connection.execute("use memory")
    connection.execute("detach trace")


def is_ours(connection: duckdb.DuckDBPyConnection) -> bool:
    """Whether the attached file has the tables and views of this version."""
    try:
        found = connection.execute("select definitions from trace_database").fetchall()
    except duckdb.CatalogException:
        return False
    return found == [(tables.digest(),)]


def create_views(connection: duckdb.DuckDBPyConnection, trace: Path, state: State) -> None:
    """Show one state of a trace under the names of schema.sql.

    Derived tables are empty where they are not there; the files of those that are stay as long
    as `derived_parts.held`.
    """
    for name, files in state.segments().items():
        if files:
            connection.execute(f"create view {name} as {scan(name, files)}")
        else:
            connection.execute(_create_empty(name))
    connection.execute(tables.derived_ddl())
    for name, select in (derived.scans(trace, state.commits) or {}).items():
        connection.execute(f"drop table {name}")
        connection.execute(f"create view {name} as {select}")
    connection.execute(tables.views())


def scan(table: str, files: Iterable[Path]) -> str:
    """SELECT of a table's segments, with the columns of schema.sql.

    Those of an older version lack some, which are null, and a newer one's further ones are left
    out.
    """
    names = ", ".join("'" + str(path.resolve()).replace("'", "''") + "'" for path in files)
    known = [column for column in tables.columns() if column.table == table]
    empty = ", ".join(f"null::{column.type} as {column.name}" for column in known)
    return (
        f"select {', '.join(column.name for column in known)} from ("
        f"select {empty} where false union all by name"
        f" select * from read_parquet([{names}], union_by_name=true, hive_partitioning=false))"
    )


def _create_empty(name: str) -> str:
    columns = ", ".join(
        f"{column.name} {column.type}" for column in tables.columns() if column.table == name
    )
    return f"create table {name} ({columns})"
