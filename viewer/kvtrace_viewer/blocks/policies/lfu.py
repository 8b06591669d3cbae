"""Least frequently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, is_full, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class LFU(BlockPolicy):
    """Evict the block that was used least often since it came; of several, the oldest.

    Blocks of one count stand in the order in which they reached it, and the first of them goes.
    A block that comes back begins to count anew.
    """

    name: ClassVar[str] = "lfu"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        most = int(np.bincount(blocks).max()) if len(blocks) else 0
        return _lfu(blocks, num_blocks, capacity, most, hits, guard)


@jit
def _lfu(
    blocks: Ids, num_blocks: int, capacity: int, most: int, hits: Hits, guard: Guard | None
) -> int:
    # List n, behind the blocks, holds the blocks of count n.
    links = new_links(num_blocks, most + 2)
    count = np.zeros(num_blocks, np.int32)
    least = 1
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if count[block] > 0:
            hits[i] = 1
            unlink(links, block)
            emptied = num_blocks + least
            if count[block] == least and links[emptied, 0] == emptied:
                least += 1
            count[block] += 1
        else:
            if held == capacity:
                victim = last_free(links, num_blocks + least, guard, i)
                uses = least
                while victim >= num_blocks and uses < most and not is_full(guard, i):
                    uses += 1
                    victim = last_free(links, num_blocks + uses, guard, i)
                if victim >= num_blocks:
                    hits[i] = REFUSED
                    refuse(guard, i)
                    continue
                unlink(links, victim)
                count[victim] = 0
                evictions += 1
            else:
                held += 1
            count[block] = 1
            least = 1
        push_head(links, num_blocks + count[block], block)
    return evictions
