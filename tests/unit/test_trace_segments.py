"""Segments of tables: how they are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa

from kvtrace.segments import encode_segment, read_segment

#: Says how many native threads reading a segment leaves behind.
READ = """
import os, sys
from pathlib import Path
import pyarrow as pa
from kvtrace.segments import read_segment
before = len(os.listdir("/proc/self/task"))
read_segment(Path(sys.argv[1]), pa.schema([("a", pa.int64()), ("b", pa.string())]), None)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_columns_that_a_file_lacks_are_null(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(encode_segment(pa.table({"a": [1, 2]})))
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())])
    assert read_segment(path, schema, None).to_pydict() == {"a": [1, 2], "b": [None, None]}


def test_no_thread_holds_what_was_read(tmp_path: Path) -> None:
    """A thread of Arrow's that lets go of the bytes while Python ends would abort the process."""
    path = tmp_path / "0.parquet"
    path.write_bytes(encode_segment(pa.table({"a": list(range(100)), "b": ["x"] * 100})))
    command = [sys.executable, "-c", READ, str(path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(found.stdout) == 0
