"""Blocks of several ranks in one cache: a lower rank is always evicted before a higher one."""

from __future__ import annotations

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@jit
def run_levels(
    blocks: Ids, rank: Hits, num_blocks: int, capacity: int, recency: bool, pin: bool, hits: Hits
) -> int:
    """Run accesses through a cache; returns the evictions.

    Parameters
    ----------
    blocks : int32 [access]
        Dense ids.
    rank : uint8 [access]
        Of the block, as this access has it; at most 3.
    num_blocks, capacity : int
        Distinct blocks, and those that the cache holds.
    recency : bool
        Within a rank evict the block last used longest ago, not the one that came first.
    pin : bool
        Never evict rank 3; what comes while nothing else is left does not come in.
    hits : uint8 [access]
        Set to 1 where the block was there.
    """
    links = new_links(num_blocks, 4)
    held_rank = np.zeros(num_blocks, np.uint8)
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if links[block, 0] >= 0:
            hits[i] = 1
            if recency or held_rank[block] != rank[i]:
                unlink(links, block)
                held_rank[block] = rank[i]
                push_head(links, num_blocks + rank[i], block)
            continue
        if held == capacity:
            lowest = num_blocks
            while links[lowest, 0] == lowest:
                lowest += 1
            if pin and lowest == num_blocks + 3:
                continue
            pop_tail(links, lowest)
            evictions += 1
        else:
            held += 1
        held_rank[block] = rank[i]
        push_head(links, num_blocks + rank[i], block)
    return evictions
