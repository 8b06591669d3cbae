"""What every verb that makes a trace has to say, and what not."""

from __future__ import annotations

import sys
from pathlib import Path

import kvtrace
from kvtrace import Trace
from kvtrace.console import human_bytes
from kvtrace.errors import TraceError


def summary(path: Path, opened: Path | None = None) -> str:
    """What a trace holds now, and what to do with it next.

    Parameters
    ----------
    path : pathlib.Path
        As the user gave it; shown.
    opened : pathlib.Path, optional
        The same as an absolute path, where the program may have changed the directory.
    """
    try:
        trace = kvtrace.open(opened or path)
    except TraceError:
        return (
            "kvtrace: nothing was recorded: no transformers model ran, and no other PyTorch module"
            f" that was called attended ({path} was not made)"
        )
    rows = trace.rows
    shown = f" by {len(trace.ranks)} processes" if len(trace.ranks) > 1 else ""
    if not rows and (events := _count(trace, "kv_events")):
        return _of_events(trace, path, events)
    if not rows and (accesses := _count(trace, "block_accesses")):
        return _of_workload(trace, path, accesses)
    if not rows:
        return f"kvtrace: nothing was recorded: {path} holds no rows and no KV events"
    # Of a workload there may be millions, without tokens: counted there, never read here.
    requests = len(trace.requests())
    return (
        f"kvtrace: {rows:,} tokens of {requests} requests{shown} in {path}"
        f" ({human_bytes(trace.bytes)}, {trace.status}); next:"
        f" kvtrace replay {path} --policy h2o --budget 25%; kvtrace view {path.parent}"
    )


def _of_events(trace: Trace, path: Path, events: int) -> str:
    question = "select event, device, count(*) n from kv_events group by all order by all"
    return (
        f"kvtrace: {events:,} KV events of {_count(trace, 'blocks'):,} blocks in {path}"
        f" ({human_bytes(trace.bytes)}, {trace.status}); next:"
        f' kvtrace sql {path} "{question}"'
    )


def _of_workload(trace: Trace, path: Path, accesses: int) -> str:
    return (
        f"kvtrace: {accesses:,} block accesses of {_count(trace, 'requests'):,} requests in {path}"
        f" ({human_bytes(trace.bytes)}, {trace.status}); next:"
        f" kvtrace blocks {path} --policy lru --policy belady --capacity 10000"
    )


def _count(trace: Trace, table: str) -> int:
    return int(trace.sql(f"select count(*) n from {table}")["n"][0].as_py())


def quiet() -> None:
    """Keep transformers' progress bars out of files and pipes."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
