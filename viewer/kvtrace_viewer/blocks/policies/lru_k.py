"""LRU-K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, is_full, last_free, may_go, refuse
from kvtrace_viewer.blocks.heap import heap_pop, heap_push
from kvtrace_viewer.blocks.parking import new_parking, park, unpark
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class LRUK(BlockPolicy):
    """Evict the block whose K-th last use is longest ago; those with fewer uses before all.

    O'Neil et al., SIGMOD 1993. Blocks with fewer than K uses go by their last one. Uses are
    forgotten when the block is evicted (the paper may keep them for a while), and no two accesses
    are counted as one.
    """

    name: ClassVar[str] = "lru_k"

    k: int = parameter(2, "uses looked back", "uses", 1)

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _lru_k(blocks, num_blocks, capacity, self.k, hits, guard)


@jit
def _lru_k(
    blocks: Ids, num_blocks: int, capacity: int, k: int, hits: Hits, guard: Guard | None
) -> int:
    links = new_links(num_blocks, 1)
    times = np.zeros((num_blocks, k), np.int64)
    uses = np.zeros(num_blocks, np.int64)
    # Blocks of k uses by their k-th last one; entries made stale by a later use stay in.
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
            if uses[block] < k:
                unlink(links, block)
        elif held == capacity:
            victim = last_free(links, num_blocks, guard, i)
            if victim < num_blocks:
                unlink(links, victim)
            else:
                size = unpark(parking, guard, keys, values, size, i)
                while size > 0 and not is_full(guard, i):
                    found, key = values[0], keys[0]
                    size = heap_pop(keys, values, size)
                    if uses[found] < k or times[found, uses[found] % k] != key:
                        continue
                    if may_go(guard, found, i):
                        victim = found
                        break
                    park(parking, guard, found, key, found)
            if victim == num_blocks:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            uses[victim] = 0
            evictions += 1
        else:
            held += 1
        times[block, uses[block] % k] = i
        uses[block] += 1
        if uses[block] < k:
            push_head(links, num_blocks, block)
        else:
            size = heap_push(keys, values, size, times[block, uses[block] % k], block)
    return evictions
