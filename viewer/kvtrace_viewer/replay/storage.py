"""Keeping results beside the trace: `replays/<id>/`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np

from kvtrace.places import RowPlaces
from kvtrace.store import StoreWriter, publish
from kvtrace_viewer.replay.result import Result

CHUNK_ROWS = 4096  # rows handed to the array writer at a time


def store_result(result: Result, directory: Path) -> None:
    """Write a result under `directory` (a trace's `replays/`), replacing one of the same name.

    Readers see the old result or the new one, whole: it is written aside and renamed.
    """
    aside = directory / f".{result.id}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    writer = StoreWriter(aside)
    places = result.places
    _, layers, kv_heads = result.evicted_at.shape
    writer.declare_array(
        "evicted_at", tail=(layers, kv_heads), dtype="int32", axes="row,layer,kv_head"
    )
    for start in range(0, len(result.evicted_at), CHUNK_ROWS):
        writer.append_rows("evicted_at", result.evicted_at[start : start + CHUNK_ROWS])
    writer.append("replays", _row(result))
    for table, columns in (("replay_steps", result.steps), ("replay_heads", result.heads)):
        length = len(next(iter(columns.values())))
        writer.append(table, {"replay": np.full(length, result.id), **columns})
    writer.append("replay_gaps", _gaps(result))
    writer.append("replay_ranks", {"replay": [result.id] * len(places.counts), **_ranks(places)})
    writer.close()
    publish(aside, directory / result.id)


def _gaps(result: Result) -> dict[str, list[object]]:
    """A row a stretch of left-out rows; one without positions where the trace does not say."""
    rows: list[tuple[object, ...]] = []
    for one in result.left_out:
        stretches = one.ranges()
        rows += [(one.request, a, b, b - a + 1, one.reason) for a, b in stretches]
        if not stretches:
            rows.append((one.request, None, None, one.count, one.reason))
    names = ("request", "first_position", "last_position", "count", "reason")
    return {
        "replay": [result.id] * len(rows),
        **{name: [row[i] for row in rows] for i, name in enumerate(names)},
    }


def _ranks(places: RowPlaces) -> dict[str, list[int]]:
    return {
        "rank": list(places.counts),
        "first_index": list(places.first.values()),
        "rows": list(places.counts.values()),
    }


def _row(result: Result) -> dict[str, list[object]]:
    names = (
        "policy",
        "budget",
        "exactness",
        "tokens",
        "measured_rows",
        "hits",
        "misses",
        "evictions",
        "retained_mass",
        "mass_p5",
        "mass_worst",
        "sinks",
        "retained_sinks",
        "rerotate",
        "overlap",
        "output_error",
        "ties",
        "bound",
        "bound_layer",
        "bound_model",
        "bound_scope",
        "selects",
    )
    row = {name: [getattr(result, name)] for name in names}
    return {
        "replay": [result.id],
        "parameters": [json.dumps(result.parameters)],
        "decide_when": [result.when],
        "created_ns": [time.time_ns()],
        **row,
    }
