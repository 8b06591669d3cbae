"""One line about each trace, for the list of runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import duckdb
import pyarrow as pa

from kvtrace.cached import model_kinds
from kvtrace.errors import KvtraceError
from kvtrace.trace import Trace
from kvtrace_viewer.library import TraceEntry, TraceLibrary


def summaries(library: TraceLibrary) -> list[dict[str, Any]]:
    """One row for every trace, newest first; a broken one has its error and nothing else."""
    return [_summary(entry) for entry in library.entries()]


def _summary(entry: TraceEntry) -> dict[str, Any]:
    row: dict[str, Any] = {"id": entry.id, "name": _without_suffix(entry.id)}
    if entry.trace is None:
        return row | {"status": "unreadable", "error": entry.error}
    try:
        return row | _facts(entry.trace)
    except (KvtraceError, OSError, ValueError, pa.ArrowException, duckdb.Error) as error:
        return row | {"status": "unreadable", "error": str(error)}


def _facts(trace: Trace) -> dict[str, Any]:
    requests = trace.requests()
    kinds = model_kinds(trace)
    # A model that several processes ran counts once.
    models = [
        row for row in trace.table("models").to_pylist() if kinds[row["model"]] == row["model"]
    ]
    run: dict[str, Any] = next(iter(trace.table("runs").to_pylist()), {})
    layers = [layer for layer in trace.layers if kinds[layer.model] == layer.model]
    started_ns = run.get("started_ns") or min((r.started_ns for r in requests), default=0)
    return {
        "status": trace.status,
        "error": None,
        "source": run.get("source"),
        "model": ", ".join(model["name"] or model["architecture"] or "?" for model in models),
        "layers": len(layers),
        "heads": _heads(trace),
        "requests": len(requests),
        "tokens": sum(request.tokens for request in requests),
        "rows": trace.rows,
        "bytes": trace.bytes,
        "recorded": _local_time(started_ns) if started_ns else None,
        "replays": trace.replays().num_rows,
    }


def _heads(trace: Trace) -> str:
    """Query and KV heads, as "8 / 2"; the distinct pairs where layers differ."""
    pairs = {(layer.num_q_heads, layer.num_kv_heads): None for layer in trace.layers}
    return ", ".join(f"{q} / {kv}" for q, kv in pairs)


def _local_time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _without_suffix(trace_id: str) -> str:
    return trace_id.removesuffix(".kvtrace")
