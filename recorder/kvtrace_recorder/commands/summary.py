"""The last line of every verb that makes a trace."""

from __future__ import annotations

from pathlib import Path

import kvtrace
from kvtrace.console import human_bytes
from kvtrace.errors import TraceError


def summary(path: Path) -> str:
    """What a trace holds now, and what to do with it next."""
    try:
        trace = kvtrace.open(path)
    except TraceError:
        return f"kvtrace: nothing was recorded: no transformers model ran ({path} was not made)"
    if not trace.rows:
        return f"kvtrace: nothing was recorded: no transformers model ran ({path} holds no rows)"
    return (
        f"kvtrace: {trace.rows:,} tokens of {len(trace.requests())} requests in {path}"
        f" ({human_bytes(trace.bytes)}, {trace.status}); next:"
        f" kvtrace replay {path} --policy h2o --budget 25%; kvtrace view {path.parent}"
    )
