"""Segmented LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class SLRU(BlockPolicy):
    """Several LRU lists one above the other; a hit lifts a block by one, overflow lowers it.

    Karedla et al. 1994, with segments of one size; what does not divide evenly is the lowest's. A
    new block enters the lowest segment, and what that one pushes out is evicted; while the cache
    fills, a new block enters the lowest segment with room. Hits on the reference streams are the
    independent simulator's, or within 0.15 points of the hit ratio where the capacity does not
    divide evenly.
    """

    name: ClassVar[str] = "slru"

    segments: int = parameter(4, "LRU lists", "lists", 1)

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        segments = min(self.segments, capacity)
        limits = np.full(segments, capacity // segments, np.int64)
        limits[0] += capacity - limits.sum()
        return _slru(blocks, num_blocks, limits, hits)


@jit
def _slru(blocks: Ids, num_blocks: int, limits: Counts, hits: Hits) -> int:
    links = new_links(num_blocks, len(limits))
    level = np.full(num_blocks, -1, np.int64)
    sizes = np.zeros(len(limits), np.int64)
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        joins = 0
        if level[block] >= 0:
            hits[i] = 1
            unlink(links, block)
            sizes[level[block]] -= 1
            joins = min(level[block] + 1, len(limits) - 1)
        else:
            while joins < len(limits) and sizes[joins] >= limits[joins]:
                joins += 1
            if joins == len(limits):
                joins = 0
        level[block] = joins
        push_head(links, num_blocks + joins, block)
        sizes[joins] += 1
        while joins >= 0 and sizes[joins] > limits[joins]:
            lowered = pop_tail(links, num_blocks + joins)
            sizes[joins] -= 1
            joins -= 1
            level[lowered] = joins
            if joins >= 0:
                push_head(links, num_blocks + joins, lowered)
                sizes[joins] += 1
            else:
                evictions += 1
    return evictions
