"""Blocks of several ranks in one cache: a lower rank is always evicted before a higher one."""

from __future__ import annotations

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@jit
def run_levels(
    blocks: Ids,
    rank: Hits,
    num_blocks: int,
    capacity: int,
    recency: bool,
    hits: Hits,
    guard: Guard | None,
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
    hits : uint8 [access]
        Set to 1 where the block was there, to 3 where it found no room.
    guard : Guard or None
        What must not be evicted.
    """
    links = new_links(num_blocks, 4)
    held_rank = np.zeros(num_blocks, np.uint8)
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if links[block, 0] >= 0:
            hits[i] = 1
            if recency or held_rank[block] != rank[i]:
                unlink(links, block)
                held_rank[block] = rank[i]
                push_head(links, num_blocks + rank[i], block)
            continue
        if held == capacity:
            lowest = num_blocks
            victim = last_free(links, lowest, guard, i)
            while victim == lowest and lowest < num_blocks + 3:
                lowest += 1
                victim = last_free(links, lowest, guard, i)
            if victim == lowest:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            unlink(links, victim)
            evictions += 1
        else:
            held += 1
        held_rank[block] = rank[i]
        push_head(links, num_blocks + rank[i], block)
    return evictions
