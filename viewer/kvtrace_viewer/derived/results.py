"""Replay results in the form the pages show them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.store import StoreReader
from kvtrace.trace import Trace
from kvtrace_viewer.replay.result import BOUNDS


def replay_rows(trace: Trace) -> list[dict[str, Any]]:
    """Rows of table `replays` in the order they were made, NaN as None.

    With a label to show, `kl` and `agreement` where the model was run under the kept sets, and
    `own_bound`, the bound that holds for the policy, as view `replay_compare` gives it.
    """
    rows = [
        {name: _finite(value) for name, value in row.items()} for row in trace.replays().to_pylist()
    ]
    certified = _certified(trace)
    bounds: dict[tuple[str, str, str | None], float] = {}
    for row in rows:
        best = "retained_mass" if row["policy"] == "top_k" else None
        for scope, name in {**BOUNDS, "read": best}.items():
            if name is not None and row[name] is not None:
                at = (row["budget"], row["decide_when"], scope)
                bounds[at] = max(row[name], bounds.get(at, 0.0))
    return [
        row
        | {
            "label": label(row),
            "own_bound": bounds.get((row["budget"], row["decide_when"], row["bound_scope"])),
        }
        | certified.get(row["replay"], {})
        for row in rows
    ]


def _certified(trace: Trace) -> dict[str, dict[str, float]]:
    """`kl` and `agreement` over all rows of the requests of each certified replay."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in trace.table("certificates").to_pylist():
        found.setdefault(row["replay"], []).append(row)
    return {
        replay: {
            name: sum(row[column] * row["rows"] for row in rows) / sum(row["rows"] for row in rows)
            for name, column in (("kl", "kl_mean"), ("agreement", "agreement"))
        }
        for replay, rows in found.items()
    }


def label(row: dict[str, Any]) -> str:
    """Policy and budget in a few words, and whether keys were re-rotated."""
    return f"{row['policy']} · {row['budget']}" + (" · re-rotated" if row.get("rerotate") else "")


def open_replay(trace: Trace, replay: str) -> StoreReader:
    """Open a result by id.

    Raises
    ------
    InputError
        For an id that is not listed; ids are never joined to a path unlisted.
    """
    if replay not in trace.replays()["replay"].to_pylist():
        raise InputError(
            f"no replay {replay!r} in {trace.name}; expected one of those listed; run it first"
        )
    return trace.replay(replay)


def evicted_at(
    trace: Trace, replay: str, layer: int, kv_head: int, request: int
) -> NDArray[np.int32]:
    """One column of a result, by position in the request.

    Returns
    -------
    int32 [token]: position of the query token after whose row the key was evicted, -1 = never.
    """
    opened = open_replay(trace, replay)
    rows = trace.replay_places(replay).of(trace.request_rows(request))
    if rows.size == 0:
        return np.empty(0, np.int32)
    first, stop = int(rows.min()), int(rows.max()) + 1
    stored = opened.array("evicted_at").read(first, stop, lane=layer)
    column: NDArray[np.int32] = np.asarray(stored, np.int32)[rows - first, kv_head]
    return column


def replay_steps(trace: Trace, replay: str, request: int) -> dict[str, Any]:
    """Measured rows of one request: positions, mass, held slots and evictions, as lists."""
    reader = open_replay(trace, replay)
    row = next(row for row in replay_rows(trace) if row["replay"] == replay)
    steps: pa.Table = reader.table("replay_steps")
    steps = steps.filter(pc.field("request") == request).sort_by("position")
    return {
        "label": row["label"],
        "position": steps["position"].to_pylist(),
        "mass": [_finite(value) for value in steps["mass"].to_pylist()],
        "held": steps["held"].to_pylist(),
        "evictions": steps["evictions"].to_pylist(),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
