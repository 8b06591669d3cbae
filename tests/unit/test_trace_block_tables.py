"""Block tables from block events: what joins, what leaves, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvtrace
from kvtrace.block_tables import block_tables
from kvtrace.errors import InputError
from kvtrace.writer import TraceWriter

#: ts_ns, request, event, block, cache_group, block_index, device; not in the order of time.
EVENTS: list[tuple[Any, ...]] = [
    (30, 0, "free", 8, None, 1, "cpu"),
    (30, 0, "share", 5, None, 1, "cpu"),
    (10, 0, "allocate", 7, None, 0, "cpu"),
    (10, 0, "allocate", 8, None, 1, "cpu"),
    (20, 1, "fork", 9, 1, 0, "cpu"),
    (40, 0, "offload", 3, None, 0, "cpu swap"),
    (50, 0, "free", 3, None, 0, "cpu swap"),
    (60, None, "evict", 5, None, None, "cpu"),
    (70, 0, "free", 7, None, 0, "cpu"),
    (70, 0, "free", 5, None, 1, "cpu"),
]


@pytest.fixture
def trace(tmp_path: Path) -> kvtrace.Trace:
    columns = ("ts_ns", "request", "event", "block", "cache_group", "block_index", "device")
    values = dict(zip(columns, map(list, zip(*EVENTS, strict=True)), strict=True))
    count = len(EVENTS)
    with TraceWriter(tmp_path / "a.kvtrace", source="synthetic", detail="events") as writer:
        writer.append("kv_events", {**values, "bytes": [0] * count, "tokens": [0] * count})
        writer.append("steps", {"step": [0, 1], "model": [0, 0], "started_ns": [15, 35]})
    return kvtrace.open(tmp_path / "a.kvtrace")


def test_tables_follow_the_time_of_the_events(trace: kvtrace.Trace) -> None:
    assert block_tables(trace, at_ns=9) == {}
    assert block_tables(trace, at_ns=10) == {(0, 0): [7, 8]}
    assert block_tables(trace, at_ns=29) == {(0, 0): [7, 8], (1, 1): [9]}
    # A block gave way to a cached one of the same content; moves to the swap pool change nothing.
    assert block_tables(trace, at_ns=65) == {(0, 0): [7, 5], (1, 1): [9]}
    assert block_tables(trace) == {(1, 1): [9]}


def test_tables_of_a_step_are_those_it_began_with(trace: kvtrace.Trace) -> None:
    assert block_tables(trace, step=0) == {(0, 0): [7, 8]}
    assert block_tables(trace, step=1) == {(0, 0): [7, 5], (1, 1): [9]}
    with pytest.raises(InputError, match=r"step 2 was not found in .*; it has 2"):
        block_tables(trace, step=2)
