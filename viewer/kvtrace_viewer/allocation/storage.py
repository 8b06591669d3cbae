"""Keeping what pools came to beside the trace: `whatifs/<id>/`, tables `allocation_*`."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvtrace.store import StoreWriter, publish
from kvtrace.trace import Trace
from kvtrace_viewer.allocation.residency import GAP, IDLE, LIFETIME
from kvtrace_viewer.allocation.result import PoolResult
from kvtrace_viewer.allocation.waits import first_steps

Columns = Mapping[str, Any]
_RUN = (
    "block_size",
    "pool",
    "steps",
    "requests",
    "preemptions",
    "recomputed_tokens",
    "swapped_blocks",
    "cached_tokens",
    "evictions",
    "peak_blocks",
    "mean_blocks",
    "mean_occupancy",
    "peak_bytes",
    "mean_cached_blocks",
    "peak_shared_blocks",
    "internal_fragmentation",
    "wait_steps_mean",
    "wait_steps_max",
    "wait_s_mean",
    "span_s",
    "wait_steps_p95",
    "preempted_steps_mean",
    "preempted_steps_max",
    "preempted_s_mean",
    "tokens_per_s",
)


def run_id(result: PoolResult) -> str:
    """Name of a run's folder: recorded, or the settings with a digest of all of them."""
    if result.what_if is None:
        return "allocation-recorded"
    settings = result.what_if.settings
    digest = hashlib.sha256(json.dumps(settings.to_json()).encode()).hexdigest()[:8]
    return f"allocation-{settings.policy}-{settings.pool}x{settings.block_size}-{digest}"


def store(trace: Trace, result: PoolResult) -> str:
    """Write a run's tables, in the place of an older run of the same name; returns the name."""
    name = run_id(result)
    directory = trace.whatif_directory()
    aside = directory / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    writer = StoreWriter(aside)
    for table, columns in _tables(result).items():
        length = len(next(iter(columns.values())))
        if length:
            writer.append(table, {"allocation_run": [name] * length, **columns})
    writer.close()
    publish(aside, directory / name)
    return name


def _tables(result: PoolResult) -> dict[str, Columns]:
    return {
        "allocation_runs": _run(result),
        "allocation_steps": _steps(result),
        "allocation_requests": _requests(result),
        "allocation_blocks": _blocks(result),
    }


def _run(result: PoolResult) -> Columns:
    found = result.to_json()
    return {
        "kind": [result.kind],
        "created_ns": [time.time_ns()],
        "settings": [json.dumps(found["settings"]) if found["settings"] else None],
        "refused": [len(found["refused"])],
        **{name: [found[name]] for name in _RUN},
    }


def _steps(result: PoolResult) -> Columns:
    pool, history = result.occupancy, result.history
    blocks = ("held", "cached", "free", "shared", "unused_slots")
    names = (*blocks, "running", "waiting", "preempted", "tokens")
    return {
        "step": np.arange(history.steps),
        "started_ns": history.started_ns,
        "duration_ns": history.duration_ns,
        "bytes_held": result.bytes_held(),
        **{name: getattr(pool, name) for name in names},
    }


def _requests(result: PoolResult) -> Columns:
    history, first = result.history, first_steps(result.history)
    last = dict(zip(history.part_request.tolist(), history.part_step.tolist(), strict=True))
    requests = sorted({*first, *result.refused})
    waits = [result.waits.get(r, (None, None)) for r in requests]
    missed = [result.preempted_waits.get(r, (0, 0)) for r in requests]
    return {
        "request": requests,
        "arrival_step": [history.arrival_step.get(r) for r in requests],
        "first_step": [first.get(r) for r in requests],
        "last_step": [last.get(r) for r in requests],
        "wait_steps": [steps for steps, _ in waits],
        "wait_ns": [ns for _, ns in waits],
        "preempted_steps": [steps for steps, _ in missed],
        "preempted_ns": [ns for _, ns in missed],
        "preemptions": [result.preempted.get(r, 0) for r in requests],
        "refused": [result.refused.get(r) for r in requests],
    }


def _blocks(result: PoolResult) -> Columns:
    stays, first = result.stays, result.history.first_block
    return {
        "block": [one.block + first for one in stays],
        "request": [None if one.request < 0 else one.request for one in stays],
        "born_ns": [one.born_ns for one in stays],
        "ended_ns": [one.ended_ns for one in stays],
        "ended_by": [one.ended_by for one in stays],
        "accesses": [len(one.accesses_ns) for one in stays],
        "max_references": [one.max_references for one in stays],
        LIFETIME: [one.lifetime_s for one in stays],
        IDLE: [one.idle_before_evict_s for one in stays],
        GAP: [one.reuse_gaps_s for one in stays],
    }
