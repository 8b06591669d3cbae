"""The tables of a trace as Parquet files, one a table, with their comments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvtrace import tables
from kvtrace.export.target import new_target
from kvtrace.trace import Trace


def export_tables(
    trace: Trace,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """Write `<table>.parquet` for every table into a new folder; returns the tables' names.

    What several ranks and several commits wrote stands in one file. Comments of tables and
    columns are in the files' schema metadata, under `comment`.

    Raises
    ------
    InputError
        Where the folder exists and `force` is not given.
    """
    schemas = tables.arrow_schemas()
    with new_target(out, force=force) as folder:
        folder.mkdir()
        for done, (name, schema) in enumerate(schemas.items(), start=1):
            with pq.ParquetWriter(
                folder / f"{name}.parquet", commented(name, schema), compression="zstd"
            ) as writer:
                for part in trace.table_parts(name):
                    writer.write_table(part.cast(writer.schema))
            progress(done / len(schemas))
    return list(schemas)


def commented(table: str, schema: pa.Schema) -> pa.Schema:
    """The schema of a table with the comments of schema.sql."""
    comments = {c.name: c.comment or "" for c in tables.columns() if c.table == table}
    fields = [field.with_metadata({"comment": comments[field.name]}) for field in schema]
    return pa.schema(fields, metadata={"comment": tables.table_comments()[table]})
