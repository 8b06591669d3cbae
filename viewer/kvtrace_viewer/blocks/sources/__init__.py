"""The block stream of a trace, from whatever the trace holds; one kind of source a file."""

from __future__ import annotations

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.blocks.sources.events import events_stream
from kvtrace_viewer.blocks.sources.recorded import recorded_stream
from kvtrace_viewer.blocks.sources.workload import workload_stream
from kvtrace_viewer.blocks.stream import BlockStream


def read_stream(trace: Trace, block_size: int | None = None) -> BlockStream:
    """Read the block stream of a trace: of an imported workload, a recorded run or KV events.

    Parameters
    ----------
    trace : Trace
        The trace.
    block_size : int, optional
        Tokens of a full block, for a recorded run; the others come in blocks of their own.

    Raises
    ------
    InputError
        Where the trace holds nothing that says which blocks were asked for, and for another
        block size where it cannot be had.
    """
    if block_size is not None and block_size < 1:
        raise InputError(
            f"block size {block_size} holds no token; at least 1 was expected; give another"
        )
    found = workload_stream(trace)
    if found is None and trace.rows:
        found = recorded_stream(trace, block_size)
    elif found is None:
        found = events_stream(trace)
    if found is None or not found.accesses:
        raise InputError(
            f"{trace.path} says of no block who asked for it; an imported workload, a recorded run"
            " or KV events were expected; make one by kvtrace import mooncake FILE --out T"
        )
    if block_size is not None and block_size != found.block_size:
        raise InputError(
            f"{trace.path} comes in blocks of {found.block_size} tokens, known by their hashes;"
            f" {block_size} was asked for; leave --block-size out"
        )
    return found
