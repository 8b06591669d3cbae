"""First in, first out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import Guard
from kvtrace_viewer.blocks.levels import run_levels
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class FIFO(BlockPolicy):
    """Evict the block that came first, however often it was used."""

    name: ClassVar[str] = "fifo"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        if guard is not None:
            rank = np.zeros(len(blocks), np.uint8)
            return run_levels(blocks, rank, num_blocks, capacity, False, hits, guard)
        return _fifo(blocks, num_blocks, capacity, hits)


@jit
def _fifo(blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    held = np.zeros(num_blocks, np.bool_)
    ring = np.full(min(capacity, num_blocks), -1, np.int32)
    oldest = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if held[block]:
            hits[i] = 1
            continue
        if ring[oldest] >= 0:
            held[ring[oldest]] = False
            evictions += 1
        held[block] = True
        ring[oldest] = block
        oldest += 1
        if oldest == len(ring):
            oldest = 0
    return evictions
