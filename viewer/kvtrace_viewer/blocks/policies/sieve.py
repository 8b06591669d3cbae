"""SIEVE: lazy promotion, quick demotion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class Sieve(BlockPolicy):
    """Move a hand from the oldest to the newest; evict the first not used since it last passed.

    Zhang et al., NSDI 2024, "SIEVE is Simpler than LRU". Unlike CLOCK's, a block that was spared
    keeps its place, and new blocks come in at the head, not at the hand.
    """

    name: ClassVar[str] = "sieve"

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _sieve(blocks, num_blocks, capacity, hits)


@jit
def _sieve(blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    links = new_links(num_blocks, 1)
    used = np.zeros(num_blocks, np.bool_)
    end = num_blocks
    hand = end
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if links[block, 0] >= 0:
            hits[i] = 1
            used[block] = True
            continue
        if held == capacity:
            if hand == end:
                hand = links[end, 0]
            while used[hand]:
                used[hand] = False
                hand = links[hand, 0]
                if hand == end:
                    hand = links[end, 0]
            victim = hand
            hand = links[victim, 0]
            unlink(links, victim)
            evictions += 1
        else:
            held += 1
        push_head(links, end, block)
    return evictions
