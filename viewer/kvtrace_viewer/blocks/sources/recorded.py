"""From a recorded run: the tokens of its requests, cut into blocks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kvtrace.trace import Trace
from kvtrace_viewer.blocks.sources.sequences import Sequence, stream_of
from kvtrace_viewer.blocks.stream import BlockStream

#: Where no paged cache was recorded that had blocks of its own (vLLM's default).
DEFAULT_BLOCK_SIZE = 16


def recorded_stream(trace: Trace, block_size: int | None = None) -> BlockStream | None:
    """Blocks of the recorded requests' tokens; None where no tokens were recorded.

    Two blocks are one where their tokens are the same behind the same prefix, whatever places the
    recorded cache gave them: so any block size can be asked for. A request stands with its whole
    sequence, as it was at the end, at the time of its arrival.

    Parameters
    ----------
    trace : Trace
        A recording.
    block_size : int, optional
        Tokens of a full block; by default those of the recorded cache.
    """
    requests = sorted(trace.requests(), key=lambda one: (one.started_ns or 0, one.request))
    if not requests:
        return None
    ends = _ends_ns(trace)
    size = block_size or _recorded_block_size(trace)
    numbers: dict[tuple[int, bytes], int] = {}
    sequences = []
    for request in requests:
        tokens = trace.tokens(request.request)["token_id"].to_numpy().astype(np.int32)
        contents = _chain(tokens, size, numbers)
        counts = np.minimum(size, len(tokens) - size * np.arange(len(contents)))
        begins = size * np.arange(len(contents))
        prompt = min(request.prompt_tokens or 0, len(tokens))
        sequences.append(
            Sequence(
                contents,
                counts,
                begins >= prompt,
                request.started_ns or 0,
                prompt,
                len(tokens) - prompt,
                request.request,
                ends.get(request.request, request.started_ns or 0),
            )
        )
    return stream_of(sequences, size, "tokens of recorded requests")


def _ends_ns(trace: Trace) -> dict[int, int]:
    """When the last step ended that processed a token of each request."""
    rows, steps = trace.table("rows"), trace.table("steps")
    steps = steps.append_column("end_ns", pc.add(steps["started_ns"], steps["duration_ns"]))
    found = rows.join(steps.select(["step", "end_ns"]), "step").group_by("request")
    last = found.aggregate([("end_ns", "max")]).drop_null()
    return dict(zip(last["request"].to_pylist(), last["end_ns_max"].to_pylist(), strict=True))


def _chain(
    tokens: NDArray[np.int32], size: int, numbers: dict[tuple[int, bytes], int]
) -> NDArray[np.int64]:
    """A number for each block: the same for the same tokens behind the same block."""
    parent, found = -1, []
    for start in range(0, len(tokens), size):
        key = (parent, tokens[start : start + size].tobytes())
        parent = numbers.setdefault(key, len(numbers))
        found.append(parent)
    return np.array(found, np.int64)


def _recorded_block_size(trace: Trace) -> int:
    events = trace.table("kv_events")
    chosen = events.filter(
        pc.and_(pc.is_valid(events["block"]), pc.is_in(events["event"], pa.array(["allocate"])))
    )
    largest = pc.max(chosen["tokens"]).as_py()
    return int(largest) if largest else DEFAULT_BLOCK_SIZE
