"""Segments: the Parquet files that a table's rows come in, one a commit at most."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvtrace.checksums import FileSum, crc32c, damaged


def encode_segment(rows: pa.Table) -> pa.Buffer:
    """The bytes of a segment."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    return sink.getvalue()


def read_segment(path: Path, schema: pa.Schema, expected: FileSum | None) -> pa.Table:
    """Read a segment, if it is what was written.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    schema : pyarrow.Schema
        Of the table; columns that the file lacks are null.
    expected : FileSum or None
        What the journal says of it; None in a trace of format 1.0.

    Raises
    ------
    TraceError
        Where it is missing or differs.
    """
    try:
        data = path.read_bytes()
        if expected is not None and FileSum(len(data), crc32c(data)) != expected:
            raise damaged(path, "its checksum differs from the journal's")
        # In this thread: one of Arrow's might still hold the bytes when Python ends, and would
        # abort the process as it lets go of them. A segment is too small for more threads anyway.
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        found = file.read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, str(error)) from error
    # A trace of an older minor version may lack a column that was added since.
    return pa.table(
        {
            field.name: found[field.name].cast(field.type)
            if field.name in found.column_names
            else pa.nulls(found.num_rows, type=field.type)
            for field in schema
        },
        schema=schema,
    )
