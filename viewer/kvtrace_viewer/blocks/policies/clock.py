"""CLOCK: FIFO with a second chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class Clock(BlockPolicy):
    """Go round the blocks like a hand of a clock; evict the first that was not used since.

    Corbato 1968. A hit sets the block's bit; the hand clears set bits as it passes and takes the
    first block whose bit is clear. A new block takes the victim's place, its bit clear.
    """

    name: ClassVar[str] = "clock"

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _clock(blocks, num_blocks, capacity, hits)


@jit
def _clock(blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    held = np.zeros(num_blocks, np.bool_)
    used = np.zeros(num_blocks, np.bool_)
    ring = np.full(min(capacity, num_blocks), -1, np.int32)
    hand = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if held[block]:
            hits[i] = 1
            used[block] = True
            continue
        while ring[hand] >= 0 and used[ring[hand]]:
            used[ring[hand]] = False
            hand = hand + 1 if hand + 1 < len(ring) else 0
        if ring[hand] >= 0:
            held[ring[hand]] = False
            evictions += 1
        held[block] = True
        ring[hand] = block
        hand = hand + 1 if hand + 1 < len(ring) else 0
    return evictions
