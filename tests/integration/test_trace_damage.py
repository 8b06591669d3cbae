"""One wrong bit in any file: `check` finds it, and no reading returns a wrong number for it.

The bit is flipped in place and the file's times are kept, as a failing disk would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kvtrace
from kvtrace import KvtraceError, arrays, checksums, tables
from kvtrace.check import check
from kvtrace.check.report import Status
from kvtrace.store import StoreReader, StoreWriter
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

ARRAYS = ("q", "k", "v", "lse")


def make_trace(path: Path, *, closed: bool) -> None:
    """A trace with full shards, an open tail or a last partial shard, sums, a matrix, a replay."""
    spec = [LayerSpec(layer, 2, 1, 8, 8, 0.5) for layer in range(2)]
    writer = TraceWriter(path, source="synthetic", dtype="float32")
    write_synthetic(writer, spec, [40, 1, 1])
    writer.put_static("wo", np.arange(64, dtype="f4").reshape(2, 4, 8), "layer,hidden,width")
    writer.add_received(0, 0, np.arange(30), np.ones((30, 2), np.float32))
    writer.add_gap("tokens", 1, "made up")
    writer.commit()
    replay = StoreWriter(path / "replays/r1")
    replay.declare_array("evicted_at", tail=(2, 1), dtype="int32", axes="row,layer,kv_head")
    replay.append_rows("evicted_at", np.arange(84, dtype="i4").reshape(42, 2, 1))
    replay.append("replays", {"replay": ["r1"], "policy": ["h2o"], "tokens": [42]})
    replay.close()
    if closed:
        writer.close()
    else:
        # As a kill leaves it: the lock goes, nothing is sealed.
        writer._store._journal.close()


@pytest.fixture(scope="module", params=["closed", "cut off"])
def damaged_trace(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A trace, and everything that can be read from it."""
    path = tmp_path_factory.mktemp("damage") / "x.kvtrace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "CHUNK_BYTES", 256)
        patch.setattr(arrays, "CHUNKS_PER_SHARD", 2)
        patch.setattr(arrays, "TAIL_BYTES", 512)
        make_trace(path, closed=request.param == "closed")
        found = read_everything(path)
        report = check(path)
        assert report.status is (Status.WHOLE if request.param == "closed" else Status.CUT_OFF)
        yield path, found


def read_everything(path: Path) -> dict[str, Any]:
    """What a user can read of a trace, by name; a KvtraceError where something refuses."""
    found: dict[str, Any] = {}

    def read(name: str, value: Any) -> None:
        try:
            found[name] = value()
        except KvtraceError as error:
            found[name] = error

    read("trace", lambda: kvtrace.open(path))
    trace = found.pop("trace")
    if isinstance(trace, KvtraceError):
        return {"opening": trace}
    found |= {"manifest": trace.manifest, "rows": trace.rows, "status": trace.status}
    for table in tables.arrow_schemas():
        read(f"table {table}", lambda table=table: trace.table(table))
    for table in ("rows", "tokens", "replays"):
        read(f"sql {table}", lambda table=table: trace.sql(f"select * from {table}"))
    for layer in range(2):
        for kind in (*ARRAYS, "received"):
            read(f"{kind} {layer}", lambda k=kind, n=layer: getattr(trace.layer_data(n), k))
    read("attention", lambda: trace.attention(0, 0))
    read("wo", lambda: trace.static("wo"))

    def evicted() -> Any:
        store: StoreReader = trace.replay("r1")
        return store.array("evicted_at").read(0, store.rows)

    read("evicted_at", evicted)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, pa.Table):
        return isinstance(other, pa.Table) and one.equals(other)
    return bool(one == other)


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """A file with one bit wrong and its times as before."""
    whole, stat = path.read_bytes(), path.stat()
    wrong = bytearray(whole)
    wrong[at] ^= 1 << bit
    try:
        path.write_bytes(bytes(wrong))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        # Another process would not have seen the file before.
        checksums._sum_of.cache_clear()
        yield
    finally:
        path.write_bytes(whole)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        checksums._sum_of.cache_clear()


def assert_harmless(path: Path, want: dict[str, Any], file: Path, at: int, bit: int) -> None:
    """What is read with this bit wrong is right, and all of it is where `check` finds nothing."""
    place = f"byte {at}, bit {bit} of {file.relative_to(path)}"
    usual = check(path).problems
    with flipped(file, at, bit):
        report = check(path)
        found = read_everything(path)
    refused = {name for name, value in found.items() if isinstance(value, KvtraceError)}
    for name, value in found.items():
        if name not in refused:
            wrong = name != "status" and not same(value, want[name])
            # A commit that is cut off never was: fewer rows, and the status says so.
            ended = found.get("status") == "cut off" and report.problems != usual
            assert not wrong or ended, f"{place}: {name} is wrong"
    if report.problems == usual:
        assert not refused, f"{place}: not found, but {refused} cannot be read"
        assert all(same(value, want[name]) for name, value in found.items()), place


def flip_any_bit(path: Path, want: dict[str, Any], data: st.DataObject) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    at = data.draw(st.integers(0, file.stat().st_size - 1), label="byte")
    assert_harmless(path, want, file, at, data.draw(st.integers(0, 7), label="bit"))


# Not shrunk: every example reads the whole trace, and which byte it was is said.
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_one_wrong_bit_is_found_or_irrelevant(
    damaged_trace: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    flip_any_bit(*damaged_trace, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=400, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_many_wrong_bits_are_found_or_irrelevant(
    damaged_trace: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    flip_any_bit(*damaged_trace, data)
