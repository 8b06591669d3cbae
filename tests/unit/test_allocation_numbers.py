"""Occupancy, lifetimes and fragmentation of histories that are worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtrace
from kvtrace.writer import TraceWriter
from kvtrace_viewer.allocation.contiguous import contiguous
from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, FREE, KEEP, SHARE, PoolHistory
from kvtrace_viewer.allocation.observed import observe
from kvtrace_viewer.allocation.occupancy import occupancy
from kvtrace_viewer.allocation.residency import GAP, IDLE, LIFETIME, metrics, residencies
from kvtrace_viewer.allocation.result import PoolResult
from kvtrace_viewer.allocation.waits import Absence, absences

S = 1_000_000_000
#: moment, kind, request, block, index; a second a moment.
EVENTS = [
    (0, ALLOCATE, 0, 0, 0),
    (0, ALLOCATE, 0, 1, 1),
    (1, SHARE, 1, 0, 0),
    (1, ALLOCATE, 1, 2, 1),
    (2, KEEP, 0, 0, 0),
    (2, FREE, 0, 1, 1),
    (3, KEEP, 1, 0, 0),
    (3, FREE, 1, 2, 1),
    (4, SHARE, 2, 0, 0),
    (5, KEEP, 2, 0, 0),
    (6, EVICT, -1, 0, -1),
]


@pytest.fixture
def history() -> PoolHistory:
    table: Any = np.array(EVENTS)
    parts: Any = np.array([(0, 0, 0, 6), (1, 0, 6, 1), (1, 1, 4, 3), (2, 1, 7, 1), (4, 2, 4, 0)])
    names = ("moment", "kind", "request", "block", "index")
    part = ("part_step", "part_request", "part_past", "part_count")
    events: dict[str, Any] = {name: table[:, i] for i, name in enumerate(names)}
    lanes: dict[str, Any] = {name: parts[:, i] for i, name in enumerate(part)}
    return PoolHistory(
        block_size=4,
        num_blocks=4,
        bytes_per_block=100,
        **events,
        ts_ns=table[:, 0] * S,
        started_ns=np.arange(7) * S,
        duration_ns=np.full(7, S),
        **lanes,
        arrival_step={0: 0, 1: 0, 2: 2},
    )


def test_a_shared_prefix_is_full_before_its_request_runs(history: PoolHistory) -> None:
    later = history.part_step + ((history.part_request == 1) & (history.part_step == 1))
    found = occupancy(replace(history, part_step=later))
    # Of the blocks of request 1 at step 1, the shared one is full and the other is empty.
    assert found.unused_slots[1] == 1 + 4


def test_occupancy_is_that_of_each_step(history: PoolHistory) -> None:
    found = occupancy(history)
    assert found.held.tolist() == [2, 3, 2, 0, 1, 0, 0]
    assert found.cached.tolist() == [0, 0, 0, 1, 0, 1, 0]
    assert found.free.tolist() == [2, 1, 2, 3, 3, 3, 4]
    assert found.shared.tolist() == [0, 1, 0, 0, 0, 0, 0]
    # Of 8 slots 6 are full, then 7; the other request's 7 of 8, then all.
    assert found.unused_slots.tolist() == [2, 2, 0, 0, 0, 0, 0]
    assert found.running.tolist() == [1, 2, 1, 0, 1, 0, 0]
    assert found.waiting.tolist() == [1, 0, 1, 1, 0, 0, 0]
    assert history.tables_at(1) == {0: [0, 1], 1: [0, 2]}
    assert history.tables_at(6) == {}


def test_what_a_preempted_request_missed_is_counted_apart() -> None:
    # Request 0 takes blocks 0 and 1, loses both before step 2, is back in step 5, ends before 6;
    # request 1 gives up one of two and goes on. Evictions are of no request.
    events = [(0, 0, 0, 0, 0), (1, 0, 0, 1, 1), (1, 0, 1, 2, 0), (1, 0, 1, 3, 1), (2, 2, 0, 0, 0)]
    events += [(2, 3, 0, 1, 1), (3, 4, -1, 1, -1), (3, 2, 1, 3, 1), (4, 0, 0, 0, 0)]
    events += [(4, 2, 0, 0, 0), (5, 0, 0, 0, 0), (6, 2, 0, 0, 0)]
    table: Any = np.array(events)
    parts: Any = np.array([(0, 0, 0, 4), (1, 0, 4, 1), (1, 1, 0, 5), (4, 1, 5, 1), (5, 0, 0, 5)])
    names = ("moment", "kind", "request", "block", "index")
    part = ("part_step", "part_request", "part_past", "part_count")
    columns: dict[str, Any] = {name: table[:, i] for i, name in enumerate(names)}
    columns |= {name: parts[:, i] for i, name in enumerate(part)}
    found = PoolHistory(
        block_size=4,
        num_blocks=4,
        bytes_per_block=0,
        **columns,
        ts_ns=table[:, 0] * S,
        started_ns=np.arange(6) * S,
        duration_ns=np.full(6, S),
    )
    assert absences(found) == [Absence(request=0, lost_step=2, back_step=5)]
    assert occupancy(found).preempted.tolist() == [0, 0, 1, 1, 1, 0]
    numbers = PoolResult(found, None, {0: 1}).to_json()
    assert numbers["preempted_steps_mean"] == 1.5
    assert numbers["preempted_steps_max"] == 3
    assert numbers["preempted_s_mean"] == 1.5


def test_lifetimes_idle_times_and_gaps_are_those_of_the_events(history: PoolHistory) -> None:
    stays = residencies(history)
    assert [(one.block, one.lifetime_s, one.ended_by) for one in stays] == [
        (0, 6.0, "evict"),
        (1, 2.0, "free"),
        (2, 2.0, "free"),
    ]
    assert [one.idle_before_evict_s for one in stays] == [2.0, None, None]
    assert [one.reuse_gaps_s for one in stays] == [[3.0], [], []]
    assert [one.max_references for one in stays] == [2, 1, 1]
    found = metrics(stays)
    lifetime = found[LIFETIME]
    assert lifetime is not None
    assert lifetime["mean"] == pytest.approx(10 / 3)
    assert found[IDLE] == {"count": 1, "mean": 2.0, "p50": 2.0, "p95": 2.0}
    assert found[GAP] == {"count": 1, "mean": 3.0, "p50": 3.0, "p95": 3.0}


def trace_of(path: Path, events: dict[str, list[object]]) -> kvtrace.Trace:
    with TraceWriter(path, source="synthetic", detail="events") as writer:
        writer.append("kv_events", events)
    return kvtrace.open(path)


def test_growing_tensors_leave_holes(tmp_path: Path) -> None:
    # Layer 0 grows from 1 to 2 units while layer 1 stands behind it: the first unit becomes a hole.
    trace = trace_of(
        tmp_path / "a.kvtrace",
        {
            "ts_ns": [1, 2, 3, 4],
            "request": [0] * 4,
            "layer": [0, 1, 0, None],
            "event": ["grow", "grow", "grow", "free"],
            "tokens": [1, 1, 2, 0],
            "bytes": [512, 512, 1000, 0],
        },
    )
    found = contiguous(trace)
    assert found is not None
    assert found.used_bytes.tolist() == [512, 1024, 1536, 0]
    assert found.reach_bytes.tolist() == [512, 1024, 2048, 0]
    assert found.hole_bytes.tolist() == [0, 0, 512, 0]
    assert found.external_fragmentation().tolist() == [0, 0, 0.25, 0]
    assert found.peak_reach_bytes == 2048


def test_a_streams_blocks_live_from_store_to_remove(tmp_path: Path) -> None:
    trace = trace_of(
        tmp_path / "a.kvtrace",
        {
            "ts_ns": [0, S, 2 * S, 5 * S, 9 * S],
            "block": [70, 71, 70, 70, 70],
            "event": ["store", "store", "touch", "touch", "remove"],
            "tokens": [16] * 5,
            "device": ["gpu"] * 5,
        },
    )
    found = observe(trace)
    assert found.num_blocks == 2
    stays = residencies(found)
    assert [(one.lifetime_s, one.idle_before_evict_s, one.reuse_gaps_s) for one in stays] == [
        (9.0, 4.0, [3.0]),
        (None, None, []),
    ]
    assert occupancy(found).cached.tolist() == [1, 2, 2, 2, 1]
