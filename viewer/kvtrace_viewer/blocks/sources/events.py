"""From KV events of a serving engine: what it stored, and what it touched again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtrace.trace import Trace
from kvtrace_viewer.blocks.sources.sequences import Sequence, stream_of
from kvtrace_viewer.blocks.stream import BlockStream

_NOTE = (
    "KV events name what was stored; a hit is in them only where the engine reports it"
    " (kv_cache_report_mode full)"
)


def events_stream(trace: Trace) -> BlockStream | None:
    """Blocks that a followed engine stored or touched on the GPU; None where there are none.

    Blocks that follow one another, each the parent of the next, in one session are one request.
    """
    events = trace.table("kv_events")
    chosen = pc.and_(
        pc.is_in(events["event"], pa.array(["store", "touch"])), pc.is_valid(events["block"])
    )
    # What is copied to other media is no access.
    here = pc.or_(pc.is_null(events["device"]), pc.equal(events["device"], "gpu"))
    found = events.filter(pc.and_(chosen, pc.fill_null(here, True)))
    if not found.num_rows:
        return None
    found = found.take(np.argsort(found["ts_ns"].to_numpy(), kind="stable"))
    described = trace.table("blocks")
    parents = dict(
        zip(described["block"].to_pylist(), described["parent"].to_pylist(), strict=True)
    )
    size = pc.max(described["block_size"]).as_py() or pc.max(found["tokens"]).as_py() or 1
    rows = found.select(["ts_ns", "request", "block", "tokens"]).to_pylist()
    sequences = [_sequence(rows[a:b], size) for a, b in _runs(rows, parents)]
    return stream_of(sequences, int(size), "KV events", (_NOTE,))


def _runs(rows: list[dict[str, Any]], parents: dict[int, int | None]) -> list[tuple[int, int]]:
    """First row and end of every stretch in which each block is the parent of the next."""
    begins = [
        i
        for i, row in enumerate(rows)
        if i == 0
        or row["request"] != rows[i - 1]["request"]
        or parents.get(row["block"]) != rows[i - 1]["block"]
    ]
    return list(zip(begins, [*begins[1:], len(rows)], strict=True))


def _sequence(rows: list[dict[str, Any]], size: int) -> Sequence:
    tokens = np.array([size if row["tokens"] is None else row["tokens"] for row in rows])
    return Sequence(
        contents=np.array([row["block"] for row in rows], np.int64),
        tokens=tokens,
        is_output=np.zeros(len(rows), np.bool_),
        arrival_ns=rows[0]["ts_ns"],
        prompt_tokens=int(tokens.sum()),
    )
