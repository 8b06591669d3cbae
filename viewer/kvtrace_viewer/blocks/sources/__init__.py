"""The block stream of a trace, from whatever the trace holds; one kind of source a file."""

from __future__ import annotations

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.blocks.sources.workload import workload_stream
from kvtrace_viewer.blocks.stream import BlockStream


def read_stream(trace: Trace) -> BlockStream:
    """Read the block stream of a trace.

    Raises
    ------
    InputError
        Where the trace holds nothing that says which blocks were asked for.
    """
    found = workload_stream(trace)
    if found is None or not found.accesses:
        raise InputError(
            f"{trace.path} says of no block who asked for it; an imported workload was expected;"
            " make one by kvtrace import mooncake FILE --out T"
        )
    return found
