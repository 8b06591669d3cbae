"""Which blocks of a paged cache each request held, from the events of the trace."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvtrace.errors import InputError
from kvtrace.trace import Trace

#: Events by which a block comes to stand in a request's block table.
JOINING = ("allocate", "share", "fork")
_COLUMNS = ("ts_ns", "request", "event", "block", "cache_group", "block_index", "bytes")

#: Request and cache group, 0 where a cache has one.
Key = tuple[int, int]


def block_tables(
    trace: Trace, *, step: int | None = None, at_ns: int | None = None
) -> dict[Key, list[int]]:
    """Block tables of the requests that hold blocks at a moment.

    Parameters
    ----------
    trace : Trace
        A recording of continuous batching.
    step : int, optional
        As they stood when this step began.
    at_ns : int, optional
        As they stood at this time; without either, after the last event.

    Returns
    -------
    dict of (int, int) to list of int
        By request and cache group: the blocks, in the order of the tokens.

    Raises
    ------
    InputError
        For a step the trace does not have.
    """
    if step is not None:
        at_ns = _start_of(trace, step)
    tables: dict[Key, dict[int, int]] = {}
    for event in _block_events(trace, at_ns).to_pylist():
        table = tables.setdefault((event["request"], event["cache_group"] or 0), {})
        if event["event"] in JOINING:
            table[event["block_index"]] = event["block"]
        elif table.get(event["block_index"]) == event["block"]:
            del table[event["block_index"]]
    return {key: [table[i] for i in sorted(table)] for key, table in tables.items() if table}


def _block_events(trace: Trace, at_ns: int | None) -> pa.Table:
    """Events that change block tables, in the order in which they happened."""
    found = trace.table("kv_events")
    changing = pc.is_in(found["event"], pa.array([*JOINING, "free"]))
    chosen = pc.and_(changing, pc.is_valid(found["block_index"]))
    # What lies in the swap pool stands in no block table.
    chosen = pc.and_(chosen, pc.not_equal(found["device"], "cpu swap"))
    if at_ns is not None:
        chosen = pc.and_(chosen, pc.less_equal(found["ts_ns"], at_ns))
    found = found.filter(chosen).select(_COLUMNS)
    # Steps wait to be written together, so the rows are not in the order of the events.
    return found.take(np.argsort(found["ts_ns"].to_numpy(), kind="stable"))


def _start_of(trace: Trace, step: int) -> int:
    steps = trace.table("steps")
    found = steps.filter(pc.equal(steps["step"], step))["started_ns"]
    if not len(found):
        raise InputError(f"step {step} was not found in {trace.path}; it has {steps.num_rows}")
    return int(found[0].as_py())
