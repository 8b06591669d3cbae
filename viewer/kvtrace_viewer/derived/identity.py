"""What tells one state of a trace from another, for caches."""

from __future__ import annotations

from kvtrace.trace import Trace


def identity(trace: Trace) -> tuple[str, int, int]:
    """Path, when it was made, and rows: changes as it grows and when it is recorded again."""
    made_ns = (trace.path / "manifest.json").stat().st_mtime_ns
    return str(trace.path), made_ns, trace.rows
