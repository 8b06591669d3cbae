"""Length-aware: the ends of long sequences go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import Guard, hold, is_full, may_go, refuse
from kvtrace_viewer.blocks.heap import heap_pop, heap_push
from kvtrace_viewer.blocks.parking import new_parking, park, unpark
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, Outcome
from kvtrace_viewer.blocks.stream import BlockStream, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class LengthAware(BlockPolicy):
    """Evict the block used least often; of several, the one farthest from its sequence's begin.

    The rule that Mooncake's paper (Qin et al., FAST 2025) tries beside LRU and LFU: the later
    blocks of long prompts are shared least. Blocks of one count and one position go oldest first.
    A block that comes back begins to count anew.
    """

    name: ClassVar[str] = "length_aware"

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        found = _length_aware(stream.blocks, stream.index, stream.num_blocks, capacity, hits, guard)
        return Outcome(hits, found)


@jit
def _length_aware(
    blocks: Ids, index: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None
) -> int:
    uses = np.zeros(num_blocks, np.int64)
    entry = np.zeros(num_blocks, np.int64)
    # Heap of (uses, position backwards), the access that made the entry; older ones are stale.
    keys = np.empty(len(blocks) + 1, np.int64)
    values = np.empty(len(blocks) + 1, np.int64)
    parking = new_parking(guard, num_blocks)
    size = 0
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if uses[block] > 0:
            hits[i] = 1
        elif held == capacity:
            victim = -1
            size = unpark(parking, guard, keys, values, size, i)
            while size > 0 and not is_full(guard, i):
                made, key = values[0], keys[0]
                found = blocks[made]
                size = heap_pop(keys, values, size)
                if uses[found] == 0 or entry[found] != made:
                    continue
                if may_go(guard, found, i):
                    victim = found
                    break
                park(parking, guard, found, key, made)
            if victim < 0:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            uses[victim] = 0
            evictions += 1
        else:
            held += 1
        uses[block] += 1
        entry[block] = i
        size = heap_push(keys, values, size, (uses[block] << 32) - index[i], i)
    return evictions
