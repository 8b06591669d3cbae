"""Keeping the results of block policies beside the trace: `whatifs/<id>/`, table `block_runs`."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from typing import Any

from kvtrace.store import StoreWriter, publish
from kvtrace.trace import Trace
from kvtrace_viewer.blocks.result import BlockResult


def store(trace: Trace, results: Sequence[BlockResult], block_size: int) -> str:
    """Write the results of one question, in the place of those of the same; returns its name."""
    asked = [
        [block_size, r.policy, r.parameters, r.capacity, r.accounting.to_json(), r.error is None]
        for r in results
    ]
    digest = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:8]
    name = f"blocks-{digest}"
    directory = trace.whatif_directory()
    aside = directory / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    writer = StoreWriter(aside)
    count = len(results)
    counted = [result.accounting.to_json() for result in results]
    columns: dict[str, list[Any]] = {
        "block_run": [name] * count,
        "created_ns": [time.time_ns()] * count,
        "parameters": [json.dumps(result.parameters, default=str) for result in results],
        "block_size": [block_size] * count,
        "accounting": [json.dumps(one) for one in counted],
    }
    plain = ("policy", "capacity", "requests", "accesses", "hits", "hit_ratio", "error")
    for column in (*plain, "evictions"):
        columns[column] = [getattr(result, column) for result in results]
    writer.append("block_runs", columns)
    writer.close()
    publish(aside, directory / name)
    return name
