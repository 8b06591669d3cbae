"""SIEVE: lazy promotion, quick demotion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, is_full, may_go, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class Sieve(BlockPolicy):
    """Move a hand from the oldest to the newest; evict the first not used since it last passed.

    Zhang et al., NSDI 2024, "SIEVE is Simpler than LRU". Unlike CLOCK's, a block that was spared
    keeps its place, and new blocks come in at the head, not at the hand.
    """

    name: ClassVar[str] = "sieve"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _sieve(blocks, num_blocks, capacity, hits, guard)


@jit
def _sieve(blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None) -> int:
    links = new_links(num_blocks, 1)
    used = np.zeros(num_blocks, np.bool_)
    end = num_blocks
    hand = end
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if links[block, 0] >= 0:
            hits[i] = 1
            used[block] = True
            continue
        if held == capacity:
            if hand == end:
                hand = links[end, 0]
            # What may go is taken in the second round at the latest.
            rest = 0 if is_full(guard, i) else 2 * held
            while rest > 0:
                if may_go(guard, hand, i):
                    if not used[hand]:
                        break
                    used[hand] = False
                else:
                    rest -= 1
                hand = links[hand, 0]
                if hand == end:
                    hand = links[end, 0]
            if rest == 0:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            victim = hand
            hand = links[victim, 0]
            unlink(links, victim)
            evictions += 1
        else:
            held += 1
        push_head(links, end, block)
    return evictions
