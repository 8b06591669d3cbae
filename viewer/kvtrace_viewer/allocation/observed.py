"""The history of a recorded pool: from a paged cache's block events, or a KV-event stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtrace.errors import InputError
from kvtrace.ranks import number_label
from kvtrace.trace import Trace
from kvtrace_viewer.allocation.history import (
    ALLOCATE,
    EVICT,
    FREE,
    KEEP,
    SHARE,
    EventLog,
    Ints,
    PoolHistory,
)

_JOINS = {"allocate": ALLOCATE, "fork": ALLOCATE, "share": SHARE}
_KINDS = ("allocate", "fork", "share", "free", "evict", "store", "touch", "remove", "clear")
NO_BLOCKS = (
    "a recording of continuous batching (kvtrace record -- SCRIPT.py with generate_batch, or"
    " transformers serve --continuous-batching) or KV events (kvtrace import kv-events) was"
    " expected"
)


def has_blocks(trace: Trace) -> bool:
    """Whether a trace has events of single blocks."""
    found = trace.sql("select count(*) n from kv_events where block is not null")
    return int(found["n"][0].as_py()) > 0


def observe(trace: Trace, group: int | None = None) -> PoolHistory:
    """Read the history of the blocks of a trace.

    Parameters
    ----------
    trace : Trace
        The trace.
    group : int, optional
        The group of layers, where they have pools of their own; by default the first.

    Raises
    ------
    InputError
        Where the trace has no events of blocks, or not of this group.
    """
    rows = _rows(trace, group)
    if not rows:
        raise InputError(f"{trace.path} has no events of blocks; {NO_BLOCKS}; record one")
    streamed = any(row["event"] in ("store", "touch", "remove") for row in rows)
    return _streamed(trace, rows) if streamed else _paged(trace, rows, group)


def groups(trace: Trace) -> list[int]:
    """Groups of layers with pools of their own; empty where there is one pool."""
    found = trace.sql(
        "select distinct cache_group g from kv_events where cache_group is not null order by g"
    )
    return [int(g) for g in found["g"].to_pylist()]


def _rows(trace: Trace, group: int | None) -> list[dict[str, Any]]:
    events = trace.table("kv_events")
    chosen = pc.and_(pc.is_in(events["event"], pa.array(_KINDS)), pc.is_valid(events["block"]))
    # What lies in the swap pool has numbers of its own; what was copied to other media is a copy.
    here = pc.is_in(events["device"], pa.array(["cpu swap", "CPU", "STORAGE", "cpu_pinned"]))
    chosen = pc.and_(chosen, pc.invert(pc.fill_null(here, False)))
    known = groups(trace)
    if known:
        wanted = known[0] if group is None else group
        if wanted not in known:
            raise InputError(f"cache group {wanted} was not found; the trace has {known}")
        chosen = pc.and_(chosen, pc.equal(events["cache_group"], wanted))
    names = ["ts_ns", "request", "event", "block", "block_index", "bytes", "tokens"]
    found = events.filter(chosen).select(names)
    order = np.argsort(found["ts_ns"].to_numpy(), kind="stable")
    rows: list[dict[str, Any]] = found.take(order).to_pylist()
    return rows


@dataclass(frozen=True)
class _Steps:
    started_ns: Ints
    duration_ns: Ints
    parts: dict[str, Any]


def _steps(trace: Trace) -> _Steps:
    steps = trace.table("steps").sort_by([("started_ns", "ascending"), ("step", "ascending")])
    parts = trace.sql(
        "with ordered as (select step, row_number() over (order by started_ns, step) - 1 as place"
        " from steps) select place, request, min(position) past, count(*) count from rows join"
        " ordered using (step) group by all order by place, min(row)"
    )
    return _Steps(
        steps["started_ns"].to_numpy(),
        steps["duration_ns"].to_numpy(),
        {
            "part_step": parts["place"].to_numpy().astype(np.int64),
            "part_request": parts["request"].to_numpy().astype(np.int64),
            "part_past": parts["past"].to_numpy().astype(np.int64),
            "part_count": parts["count"].to_numpy().astype(np.int64),
        },
    )


def _paged(trace: Trace, rows: list[dict[str, Any]], group: int | None) -> PoolHistory:
    steps, pool, notes = _steps(trace), pool_settings(trace, group), []
    lowest = min(row["block"] for row in rows)
    highest = max(row["block"] for row in rows)
    first = pool["first_block"] if pool else lowest
    size = pool["num_blocks"] if pool else highest + 1 - lowest
    if not pool:
        notes.append(
            f"the size of the pool was not recorded: {size} blocks are those that were used"
        )
    block_size = pool["block_size"] if pool else max(row["tokens"] or 0 for row in rows)
    log = EventLog()
    for row in rows:
        moment = int(np.searchsorted(steps.started_ns, row["ts_ns"], side="left"))
        kind = _JOINS.get(row["event"], EVICT if row["event"] == "evict" else FREE)
        if kind == FREE and row["bytes"]:
            kind = KEEP
        log.add(moment, kind, _or(row["request"]), row["block"] - first, _or(row["block_index"]))
    requests = trace.table("requests").to_pylist()
    arrived = {r["request"]: r["arrived_ns"] for r in requests if r["arrived_ns"] is not None}
    return PoolHistory(
        block_size=block_size or 1,
        num_blocks=size,
        bytes_per_block=max(row["bytes"] or 0 for row in rows),
        first_block=first,
        **log.columns(),
        ts_ns=np.array([row["ts_ns"] for row in rows], np.int64),
        started_ns=steps.started_ns,
        duration_ns=steps.duration_ns,
        **steps.parts,
        prompt_tokens={r["request"]: r["prompt_tokens"] or 0 for r in requests},
        names={r["request"]: r["external_id"] or number_label(r["request"]) for r in requests},
        arrived_ns=arrived,
        arrival_step={
            request: int(np.searchsorted(steps.started_ns, came, side="left"))
            for request, came in arrived.items()
        },
        notes=tuple(notes),
    )


def _streamed(trace: Trace, rows: list[dict[str, Any]]) -> PoolHistory:
    """A followed engine's: places are given in the order of storing, moments are its messages."""
    sizes = trace.table("blocks")["block_size"]
    log, times = EventLog(), []
    places: dict[int, int] = {}
    free: list[int] = []
    moments = np.unique(np.array([row["ts_ns"] for row in rows], np.int64))
    for row in rows:
        moment = int(np.searchsorted(moments, row["ts_ns"]))
        known = row["block"] in places
        if row["event"] in ("store", "touch"):
            place = places.get(row["block"])
            if place is None:
                place = places[row["block"]] = free.pop() if free else len(places)
            log.add(moment, SHARE if known else ALLOCATE, -1, place, -1)
            # An engine says of no block that it is let go: it counts as cached at once.
            log.add(moment, KEEP, -1, place, -1)
            times += [row["ts_ns"]] * 2
        elif known:
            place = places.pop(row["block"])
            free.append(place)
            log.add(moment, EVICT, -1, place, -1)
            times.append(row["ts_ns"])
    columns = log.columns()
    none = np.zeros(0, np.int64)
    return PoolHistory(
        block_size=int(pc.max(sizes).as_py() or 1),
        num_blocks=int(columns["block"].max(initial=-1)) + 1,
        bytes_per_block=0,
        **columns,
        ts_ns=np.array(times, np.int64),
        started_ns=moments,
        duration_ns=np.zeros(len(moments), np.int64),
        part_step=none,
        part_request=none,
        part_past=none,
        part_count=none,
        notes=(
            "KV events say when a block was stored, touched and removed, not who holds it: every"
            " block counts as cached, and the pool is as large as it ever was",
        ),
    )


def pool_settings(trace: Trace, group: int | None = None) -> dict[str, Any] | None:
    """The recorded settings of the pool, a row of table `kv_pools`; None where there is none."""
    found = trace.table("kv_pools").to_pylist()
    chosen = [row for row in found if group is None or row["cache_group"] == group]
    return chosen[0] if chosen else None


def _or(value: int | None) -> int:
    return -1 if value is None else int(value)
