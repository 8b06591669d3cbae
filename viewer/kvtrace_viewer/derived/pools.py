"""Histories of pools of blocks for the browser: the recorded one, and stored what-ifs again."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import PoolHistory
from kvtrace_viewer.allocation.observed import has_blocks, observe
from kvtrace_viewer.allocation.occupancy import occupancy
from kvtrace_viewer.allocation.result import PoolResult
from kvtrace_viewer.allocation.settings import Settings
from kvtrace_viewer.allocation.waits import absences, first_steps
from kvtrace_viewer.allocation.whatif import what_if
from kvtrace_viewer.allocation.workload import read_workload

RECORDED = "allocation-recorded"


def pool_runs(trace: Trace) -> list[dict[str, Any]]:
    """The recorded pool, where there is one, and every stored what-if, with their numbers."""
    rows = trace.table("allocation_runs").to_pylist()
    found = [{**row, "label": _label(row)} for row in rows if row["kind"] != "recorded"]
    kept = {row["allocation_run"]: row for row in rows}
    if has_blocks(trace):
        numbers = kept.get(RECORDED) or _numbers(trace)
        recorded = {**numbers, "allocation_run": RECORDED, "label": "As recorded"}
        return [recorded, *found]
    return found


def _numbers(trace: Trace) -> dict[str, Any]:
    found = PoolResult.recorded(trace).to_json()
    return {name: found[name] for name in found if not isinstance(found[name], list | dict)}


def _label(row: dict[str, Any]) -> str:
    settings = json.loads(row["settings"])
    words = (settings["policy"], settings["admission"], settings["preempt"])
    return f"{row['pool']:,} x {row['block_size']} · {', '.join(words)}"


def pool_history(trace: Trace, run: str) -> PoolHistory:
    """Of the recorded pool, or of a stored what-if, simulated again: that gives the same.

    Raises
    ------
    InputError
        For a run that is not there.
    """
    if run == RECORDED:
        return observe(trace)
    rows = trace.table("allocation_runs").to_pylist()
    for row in rows:
        if row["allocation_run"] == run and row["settings"]:
            settings = Settings(**json.loads(row["settings"]))
            return what_if(read_workload(trace), settings).history
    raise InputError(f"no pool {run!r} in {trace.name}; expected one that is stored; reload")


def encode_history(history: PoolHistory) -> bytes:
    """A history as JSON, its columns as little-endian int32 in base64; requests are places."""
    numbers = np.unique(np.concatenate([history.request, history.part_request]))
    numbers = numbers[numbers >= 0]
    first, pool = first_steps(history), occupancy(history)
    away: dict[int, list[list[int]]] = {}
    for one in absences(history):
        away.setdefault(one.request, []).append([one.lost_step, one.back_step])
    columns = {
        "moment": history.moment,
        "kind": history.kind,
        "request": _places(history.request, numbers),
        "block": history.block,
        "index": history.index,
        "partStep": history.part_step,
        "partRequest": _places(history.part_request, numbers),
        "partPast": history.part_past,
        "partCount": history.part_count,
        "held": pool.held,
        "cached": pool.cached,
        "unused": pool.unused_slots,
    }
    requests = [
        {
            "number": int(number),
            "name": history.names.get(int(number), str(number)),
            "prompt": history.prompt_tokens.get(int(number), 0),
            "arrival": history.arrival_step.get(int(number), first.get(int(number), 0)),
            "first": first.get(int(number)),
            "away": away.get(int(number), []),
        }
        for number in numbers
    ]
    found = {
        "blockSize": history.block_size,
        "blocks": max(history.num_blocks, int(history.block.max(initial=-1)) + 1),
        "firstBlock": history.first_block,
        "bytesPerBlock": history.bytes_per_block,
        "steps": history.steps,
        "requests": requests,
        "notes": list(history.notes),
        "columns": {name: _base64(column) for name, column in columns.items()},
    }
    return json.dumps(found).encode()


def _places(requests: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(numbers):
        return np.full(len(requests), -1)
    return np.where(requests < 0, -1, np.searchsorted(numbers, requests))


def _base64(column: NDArray[np.int64]) -> str:
    return base64.b64encode(column.astype("<i4").tobytes()).decode()
