"""Views over a trace: against the same worked out by hand, and when they are filled."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import kvtrace
from kvtrace import database, derived, tables
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

#: A scale of 1.5 makes random attention peaked enough to have sinks: synthetic.
SPECS = [
    LayerSpec(0, 4, 2, 16, 16, 1.5),
    LayerSpec(1, 4, 2, 16, 16, 1.5, attention_kind="sliding", sliding_window=90),
    LayerSpec(2, 4, 2, 16, 16, 1.5, attention_kind="bidirectional"),
]
DISTANCE = 64


def rows_of(trace: kvtrace.Trace, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in trace.sql(query).to_pylist()]


def test_every_table_view_and_column_has_a_comment() -> None:
    bare = [one.name for one in tables.catalog() if not one.comment]
    bare += [f"{c.table}.{c.name}" for t in tables.catalog() for c in t.columns if not c.comment]
    assert not bare


@pytest.mark.parametrize("layer", range(3))
def test_heads_and_keys_are_what_the_maps_say(synthetic_trace: SyntheticTrace, layer: int) -> None:
    trace = synthetic_trace(steps=[250, 10], specs=SPECS)
    total = trace.rows
    at = np.arange(total)
    for head in range(4):
        weights = trace.attention(layer, head).astype(np.float64)
        seen = weights > 0
        distance = at[:, None] - at
        entropy = -np.where(seen, weights * np.log(np.where(seen, weights, 1)), 0).sum(1)
        strong = (weights >= 0.01 * weights.max(1, keepdims=True)).sum(1)
        several = seen.sum(1) > 1
        expected = [
            entropy.mean(),
            (entropy[several] / np.log(seen.sum(1)[several])).mean(),
            (1 - strong / seen.sum(1)).mean(),
            np.where(abs(distance) <= DISTANCE, weights, 0).sum(1).mean(),
        ]
        where = f"where layer = {layer} and q_head = {head}"
        names = "entropy, entropy_share, sparsity, local_share"
        (found,) = rows_of(trace, f"select {names} from head_attention {where}")
        assert found == pytest.approx(expected, rel=1e-4)
        keys = trace.sql(f"select * from key_attention {where} order by position")
        far = seen & (distance > DISTANCE)
        for name, values in {
            "queries": seen.sum(0),
            "received": weights.sum(0),
            "uniform": (seen / seen.sum(1, keepdims=True)).sum(0),
            "far_queries": far.sum(0),
            "far_received": np.where(far, weights, 0).sum(0),
            "seen_at_end": seen[-1],
        }.items():
            np.testing.assert_allclose(keys[name].to_numpy(), values, rtol=1e-3, atol=1e-4)


def test_sinks_and_heavy_hitters_are_exclusive_and_counted(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=[250, 20], specs=[SPECS[0], replace(SPECS[0], layer=1)])
    both = "select count(*) from sink_tokens join heavy_hitters using (layer, q_head, position)"
    assert rows_of(trace, both) == [(0,)]
    (counts,) = rows_of(
        trace,
        "select (select count(*) from sink_tokens), (select count(*) from heavy_hitters),"
        " sum(sinks), sum(heavy_hitters) from head_summary",
    )
    assert counts[:2] == counts[2:]
    assert min(counts) > 0
    (least, text) = rows_of(trace, "select min(mean_attention), any_value(text) from sink_tokens")[
        0
    ]
    assert least >= 0.1
    assert text.startswith("t")


def test_derived_tables_are_there_for_any_client_once_somebody_asked(
    synthetic_trace: SyntheticTrace,
) -> None:
    trace = synthetic_trace(specs=SPECS[:1])
    path = str(trace.path / "trace.duckdb")

    def count() -> Any:
        with duckdb.connect(path, read_only=True) as connection:
            return connection.execute("select count(*) from head_summary").fetchone()

    assert count() == (0,)
    trace.sql("select count(*) from rows")
    assert count() == (0,)
    assert rows_of(trace, "select count(*) from Head_Summary") == [(4,)]
    assert count() == (4,)
    # Deletable at any time: made again.
    shutil.rmtree(trace.path / "cache")
    assert rows_of(trace, "select count(*) from head_summary") == [(4,)]
    # A replay makes trace.duckdb anew, with what was derived.
    database.build(trace.path)
    assert count() == (4,)


def test_views_do_without_what_older_clients_cannot_bind() -> None:
    # DuckDB 1.1 to 1.4 refused kv_memory in a file that 2.0 had written.
    assert not re.search(r"lag\([^()]*,", tables.views(), re.IGNORECASE)


def test_a_trace_that_grows_is_derived_anew(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.kvtrace", source="synthetic")
    write_synthetic(writer, SPECS[:1], [20])
    trace = kvtrace.open(writer.path)
    asked = "select max(queries), count(*) from head_attention"
    assert rows_of(trace, asked) == [(20, 4)]
    made_from = database.State(trace.path).commits
    assert derived.scans(trace.path, made_from)
    assert derived.scans(trace.path, {0: made_from[0] + 1}) is None
    writer.append("steps", {"step": [1], "model": [0], "phase": ["decode"]})
    row: dict[str, list[Any]] = {
        "row": [20],
        "step": [1],
        "request": [0],
        "position": [20],
        "has_query": [True],
    }
    writer.append("rows", row)
    ones = {"q": (1, 4, 16), "k": (1, 2, 16), "v": (1, 2, 16), "lse": (1, 4)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in ones.items()}
    writer.append_layer(0, 0, **arrays)
    writer.commit()
    assert rows_of(trace, asked) == [(21, 4)]
    writer.close()
    assert rows_of(kvtrace.open(writer.path), asked) == [(21, 4)]


def test_a_database_of_another_version_is_made_again(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace()
    path = trace.path / "trace.duckdb"
    stamp = path.stat().st_mtime_ns
    with duckdb.connect(str(path)) as connection:
        connection.execute("drop view request_latency; drop table trace_database")
    assert path.stat().st_mtime_ns >= stamp
    assert rows_of(trace, "select request from request_latency") == [(0,)]


def events_trace(path: Path, events: list[tuple[Any, ...]]) -> kvtrace.Trace:
    """A trace of two steps of a batch of two requests, with some events."""
    names = ("ts_ns", "step", "request", "layer", "block", "event", "bytes", "device")
    with TraceWriter(path, source="synthetic", detail="events") as writer:
        writer.append("requests", {"request": [0, 1], "model": [0, 0], "prompt_tokens": [3, 2]})
        writer.append(
            "steps",
            {
                "step": [0, 1],
                "model": [0, 0],
                "phase": ["prefill", "decode"],
                "started_ns": [1_000_000, 6_000_000],
                "duration_ns": [4_000_000, 1_000_000],
                "batch_size": [2, 2],
            },
        )
        writer.append(
            "rows",
            {
                "row": np.arange(7),
                "step": [0] * 5 + [1] * 2,
                "request": [0, 0, 0, 1, 1, 0, 1],
                "position": np.array([0, 1, 2, 0, 1, 3, 2], np.int32),
                "has_query": [False] * 7,
            },
        )
        columns = dict(zip(names, map(list, zip(*events, strict=True)), strict=True))
        writer.append("kv_events", columns)
    return kvtrace.open(path)


def test_memory_of_a_batch_is_split_and_given_back(tmp_path: Path) -> None:
    trace = events_trace(
        tmp_path / "a.kvtrace",
        [
            (10, 0, None, 0, None, "grow", 600, "cuda:0"),
            (10, 0, None, 1, None, "grow", 600, "cuda:0"),
            (20, 1, None, 0, None, "grow", 800, "cuda:0"),
            (30, None, None, 0, None, "offload", 800, "cpu"),
            (40, None, 0, None, None, "free", 0, None),
            (40, None, 1, None, None, "free", 0, None),
        ],
    )
    asked = "select ts_ns, layer, device, bytes, change_bytes, device_bytes from kv_memory"
    assert rows_of(trace, f"{asked} where request = 1 order by all") == [
        (10, 0, "cuda:0", 300, 300, 1200),
        (10, 1, "cuda:0", 300, 300, 1200),
        (20, 0, "cuda:0", 400, 100, 1400),
        (30, 0, "cpu", 400, 400, 800),
        (30, 0, "cuda:0", 0, -400, 600),
        (40, 0, "cpu", 0, -400, 0),
        (40, 0, "cuda:0", 0, 0, 0),
        (40, 1, "cuda:0", 0, -300, 0),
    ]


def test_shared_blocks_count_once_on_the_device(tmp_path: Path) -> None:
    trace = events_trace(
        tmp_path / "b.kvtrace",
        [
            (10, 0, 0, None, 7, "allocate", 64, "cuda:0"),
            (11, 0, 1, None, 7, "share", 64, "cuda:0"),
            (20, 1, 0, None, 7, "free", 64, "cuda:0"),
            (30, None, 1, None, 7, "free", 64, "cuda:0"),
            (40, None, None, None, 7, "evict", 0, "cuda:0"),
        ],
    )
    asked = "select request, bytes, device_bytes from kv_memory order by ts_ns"
    assert rows_of(trace, asked) == [(0, 64, 64), (1, 64, 64), (0, 0, 64), (1, 0, 64), (None, 0, 0)]


def test_requests_in_time(tmp_path: Path) -> None:
    trace = events_trace(tmp_path / "c.kvtrace", [(10, 0, None, 0, None, "grow", 600, "cpu")])
    asked = "select step, tokens, context_tokens, start_ms, duration_ms, wait_ms"
    assert rows_of(trace, f"{asked} from request_timeline where request = 1 order by step") == [
        (0, 2, 2, 0.0, 4.0, None),
        (1, 1, 3, 5.0, 1.0, 1.0),
    ]
    asked = "select time_to_first_token_ms, time_per_output_token_ms, total_ms, tokens_per_second"
    assert rows_of(trace, f"{asked} from request_latency where request = 0") == [
        (4.0, 2.0, 6.0, 500.0)
    ]
