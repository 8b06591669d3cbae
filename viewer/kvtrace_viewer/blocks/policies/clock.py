"""CLOCK: FIFO with a second chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import Guard, hold, is_full, may_go, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class Clock(BlockPolicy):
    """Go round the blocks like a hand of a clock; evict the first that was not used since.

    Corbato 1968. A hit sets the block's bit; the hand clears set bits as it passes and takes the
    first block whose bit is clear. A new block takes the victim's place, its bit clear.
    """

    name: ClassVar[str] = "clock"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _clock(blocks, num_blocks, capacity, hits, guard)


@jit
def _clock(blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None) -> int:
    held = np.zeros(num_blocks, np.bool_)
    used = np.zeros(num_blocks, np.bool_)
    ring = np.full(min(capacity, num_blocks), -1, np.int32)
    hand = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if held[block]:
            hits[i] = 1
            used[block] = True
            continue
        # What may go is taken in the second round at the latest.
        rest = 0 if is_full(guard, i) else 2 * len(ring)
        stuck = False
        while ring[hand] >= 0:
            if may_go(guard, ring[hand], i):
                if not used[ring[hand]]:
                    break
                used[ring[hand]] = False
            else:
                rest -= 1
                if rest <= 0:
                    stuck = True
                    break
            hand = hand + 1 if hand + 1 < len(ring) else 0
        if stuck:
            hits[i] = REFUSED
            refuse(guard, i)
            continue
        if ring[hand] >= 0:
            held[ring[hand]] = False
            evictions += 1
        held[block] = True
        ring[hand] = block
        hand = hand + 1 if hand + 1 < len(ring) else 0
    return evictions
