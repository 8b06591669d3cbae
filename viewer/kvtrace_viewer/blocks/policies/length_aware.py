"""Length-aware: the ends of long sequences go first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.heap import heap_pop, heap_push
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits, Outcome
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

    def run(self, stream: BlockStream, capacity: int) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        found = _length_aware(stream.blocks, stream.index, stream.num_blocks, capacity, hits)
        return Outcome(hits, found)


@jit
def _length_aware(blocks: Ids, index: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    uses = np.zeros(num_blocks, np.int64)
    entry = np.zeros(num_blocks, np.int64)
    # Heap of (uses, position backwards), the access that made the entry; older ones are stale.
    keys = np.empty(len(blocks) + 1, np.int64)
    values = np.empty(len(blocks) + 1, np.int64)
    size = 0
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if uses[block] > 0:
            hits[i] = 1
        elif held == capacity:
            while True:
                made = values[0]
                victim = blocks[made]
                size = heap_pop(keys, values, size)
                if uses[victim] > 0 and entry[victim] == made:
                    break
            uses[victim] = 0
            evictions += 1
        else:
            held += 1
        uses[block] += 1
        entry[block] = i
        size = heap_push(keys, values, size, (uses[block] << 32) - index[i], i)
    return evictions
