"""What a newer version wrote: more fields are ignored, what cannot be read is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kvtrace
from kvtrace import TraceError, database
from kvtrace.check import check
from kvtrace.checksums import FileSum, crc32c, document_sum
from kvtrace.journal import decode_line, encode_line
from kvtrace.segments import encode_segment
from kvtrace.testing import SyntheticTrace


def change_manifest(path: Path, **fields: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(fields)
    manifest["checksum"] = document_sum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_newer_minor_version_adds_is_ignored(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace()
    want = trace.attention(0, 0)
    change_manifest(trace.path, format_version="1.99", added_later={"by": "1.99"})
    rank = trace.path / "rank-00000"
    (line,) = (rank / "journal").read_bytes().splitlines(keepends=True)[-1:]
    entry = decode_line(line)
    assert entry is not None
    wide = pa.table({"request": [0], "position": [99], "added_later": ["x"]})
    for table, rows in (("tokens", wide), ("table_of_later", wide)):
        data = encode_segment(rows)
        name = f"tables/{table}/99999999.parquet"
        (rank / name).parent.mkdir(exist_ok=True)
        (rank / name).write_bytes(data)
        entry["segments"] = {**entry["segments"], table: [name]}
        entry.setdefault("files", {})[name] = FileSum(len(data), crc32c(data))
    entry["added_later"] = [1, 2]
    with (rank / "journal").open("ab") as journal:
        journal.write(encode_line(entry))
    found = kvtrace.open(trace.path)
    assert found.table("tokens")["position"].to_pylist()[-1] == 99
    assert (found.attention(0, 0) == want).all()
    assert found.sql("select max(position) as n from tokens").to_pylist() == [{"n": 99}]
    # It was made up: what is said of it is that, and not that it cannot be read.
    assert {one.path for one in check(trace.path).problems} <= {"rank-00000"}


def test_what_an_older_version_did_not_write_is_null(synthetic_trace: SyntheticTrace) -> None:
    # Views name columns that older segments lack: while nothing was built, no query ran at all.
    trace = synthetic_trace()
    store = trace.store(0)
    names = {}
    for path in store.segments("steps"):
        data = encode_segment(pq.read_table(path).drop_columns(["duration_ns"]))
        path.write_bytes(data)
        names[str(path.relative_to(store.directory))] = FileSum(len(data), crc32c(data))
    with (store.directory / "journal").open("ab") as journal:
        line = {"rows": store.rows, "segments": {}, "closed": True, "complete": True}
        journal.write(encode_line({**line, "files": names}))
    asked = "select distinct duration_ms from request_timeline"
    assert kvtrace.open(trace.path).sql(asked).to_pylist() == [{"duration_ms": None}]
    with duckdb.connect() as connection:
        database.create_views(connection, trace.path, database.State(trace.path))
        assert connection.execute(asked).fetchall() == [(None,)]
    assert not check(trace.path).problems


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": "2.0", "kvtrace_version": "9.1"}, r"format 2\.0.*install kvtrace 9\.1"),
        (
            {"required_features": ["ternary-keys"], "kvtrace_version": "1.7"},
            r"features ternary-keys.*install kvtrace 1\.7",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    synthetic_trace: SyntheticTrace, fields: dict[str, Any], message: str
) -> None:
    path = synthetic_trace().path
    change_manifest(path, **fields)
    with pytest.raises(TraceError, match=message):
        kvtrace.open(path)


def test_a_changed_manifest_is_damaged(synthetic_trace: SyntheticTrace) -> None:
    path = synthetic_trace().path
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"synthetic"', '"recorded"'))
    with pytest.raises(TraceError, match="damaged"):
        kvtrace.open(path)
