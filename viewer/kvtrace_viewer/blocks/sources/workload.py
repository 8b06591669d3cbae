"""From an imported workload: table `block_accesses`."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from kvtrace.trace import Trace
from kvtrace_viewer.blocks.stream import BlockStream, dense_ids


def workload_stream(trace: Trace) -> BlockStream | None:
    """The accesses as they were imported; None where nothing was."""
    table = trace.table("block_accesses")
    if not table.num_rows:
        return None
    requests = trace.table("requests")
    blocks, number = dense_ids(table["content"].to_numpy())
    names = requests["namespace"].to_pylist()
    order = requests["request"].to_numpy()
    # Requests without blocks have no accesses, but they are requests.
    lengths = np.bincount(table["request"].to_numpy() - order[0], minlength=len(order))
    return BlockStream(
        blocks=blocks,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=table["tokens"].to_numpy(),
        is_output=table["is_output"].to_numpy(zero_copy_only=False),
        arrival_ns=requests["started_ns"].to_numpy(),
        prompt_tokens=requests["prompt_tokens"].to_numpy().astype(np.int64),
        block_size=int(np.max(requests["block_size"].to_numpy())),
        num_blocks=number,
        namespaces=tuple(names) if any(name is not None for name in names) else (),
        request_ids=order,
        output_tokens=pc.fill_null(requests["output_tokens"], 0).to_numpy().astype(np.int64),
        source="imported workload",
    )
