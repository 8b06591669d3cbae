"""Times of several processes on one clock, as far as their notes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

import kvtrace
from kvtrace import tables
from kvtrace.clocks import ClockNotes, rank_clocks
from kvtrace.testing import write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

#: A wall clock of today and a monotonic clock of a machine that is up for a while.
WALL, UP = 1_795_380_093_876_627_938, 23_778_958_533_646
SECOND = 1_000_000_000


def notes(*rows: tuple[int, int, int, str | None, int | None]) -> pa.Table:
    """Table clock_sync of (rank, wall, monotonic, clock, error)."""
    run, wall, monotonic, clock, error = (list(column) for column in zip(*rows, strict=True))
    return tables.to_arrow(
        "clock_sync",
        {
            "run": run,
            "wall_ns": wall,
            "monotonic_ns": monotonic,
            "spread_ns": [1000] * len(run),
            "clock_id": clock,
            "wall_error_ns": error,
        },
    )


@given(
    st.integers(-(10**12), 10**12),
    st.integers(-(10**12), 10**12),
    st.lists(st.integers(0, 60 * SECOND), min_size=1, max_size=20),
)
def test_one_host_is_aligned_by_its_monotonic_clock(ours: int, theirs: int, at: list[int]) -> None:
    """Whatever the wall clocks were set to, one moment becomes one time."""
    table = notes(
        (0, WALL + ours, UP, "a", None),
        (0, WALL + ours + 60 * SECOND, UP + 60 * SECOND, "a", None),
        (3, WALL + theirs, UP, "a", None),
        (3, WALL + theirs + 60 * SECOND, UP + 60 * SECOND, "a", None),
    )
    clocks = rank_clocks(table, [0, 3])
    moments = np.array(at, np.int64)
    first = clocks[0].align(WALL + ours + moments)
    other = clocks[3].align(WALL + theirs + moments)
    assert first.tolist() == (WALL + ours + moments).tolist()
    assert other.tolist() == first.tolist()
    assert (clocks[0].basis, clocks[3].basis) == ("reference", "monotonic")
    assert clocks[3].uncertainty_ns == 2000


def test_a_clock_that_was_set_meanwhile_says_how_far() -> None:
    table = notes(
        (0, WALL, UP, "a", None),
        (1, WALL, UP, "a", None),
        (1, WALL + 15 * SECOND, UP + 10 * SECOND, "a", None),
    )
    clock = rank_clocks(table, [0, 1])[1]
    assert clock.align(WALL + 15 * SECOND) == WALL + 10 * SECOND
    assert clock.uncertainty_ns == 5 * SECOND + 2000


def test_two_hosts_have_their_wall_clocks_alone() -> None:
    table = notes(
        (0, WALL, UP, "a", 3000),
        (1, WALL, 5, "b", 4000),
        (2, WALL, 5, "c", None),
        (3, WALL, 5, None, 1000),
    )
    clocks = rank_clocks(table, [0, 1, 2, 3, 4])
    assert {clock.basis for rank, clock in clocks.items() if rank} == {"wall"}
    assert [clocks[r].uncertainty_ns for r in range(5)] == [0, 7000, None, 4000, None]
    assert clocks[1].align(np.array([WALL, WALL + 5])).tolist() == [WALL, WALL + 5]
    assert rank_clocks(table.slice(0, 0), [7])[7].basis == "wall"


def test_a_recording_notes_its_clocks(tmp_path: Path) -> None:
    spec = LayerSpec(0, 2, 1, 8, 8, 1.0)
    for rank in (0, 1):
        # The data is synthetic, the process is not: only of recordings are clocks noted.
        with TraceWriter(tmp_path / "t.kvtrace", rank=rank, launch="one") as writer:
            write_synthetic(writer, [spec], [5, 1, 1])
    trace = kvtrace.open(tmp_path / "t.kvtrace")
    found = trace.table("clock_sync")
    assert found["event"].to_pylist() == ["start", "close"] * 2
    assert found["run"].to_pylist() == [0, 0, 1, 1]
    assert np.all(np.diff(found["monotonic_ns"].to_numpy()) > 0)
    clock = trace.clocks()[1]
    assert clock.basis == "monotonic"
    assert abs(int(clock.align(found["wall_ns"][3].as_py())) - found["wall_ns"][3].as_py()) < SECOND
    with TraceWriter(tmp_path / "i.kvtrace", source="imported") as writer:
        write_synthetic(writer, [spec], [5])
    assert kvtrace.open(writer.path).table("clock_sync").num_rows == 0


def test_notes_are_due_every_ten_seconds() -> None:
    clocks = ClockNotes()
    assert clocks.due
    row = clocks.row("start")
    assert not clocks.due
    assert row["clock_id"] != [None]
    assert 0 <= row["spread_ns"][0] < SECOND
