"""Belady's MIN: what no policy can beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import Guard, hold, is_full, may_go, refuse
from kvtrace_viewer.blocks.heap import Keys, heap_pop, heap_push
from kvtrace_viewer.blocks.parking import Parking, new_parking, park, unpark
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, Outcome
from kvtrace_viewer.blocks.stream import BlockStream, Counts, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class Belady(BlockPolicy):
    """Evict the block whose next access is farthest away; needs the future, so a bound.

    Belady 1966. A new block always comes in, as in every other policy here; what is never
    accessed again goes first. Where blocks must stay it is the same rule among the others, and
    no bound that is proven.
    """

    name: ClassVar[str] = "belady"

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        found = _belady(stream.blocks, stream.next_access, stream.num_blocks, capacity, hits, guard)
        return Outcome(hits, found)


@jit
def _belady(
    blocks: Ids, following: Counts, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None
) -> int:
    held = np.zeros(num_blocks, np.bool_)
    # Blocks that never come again, and the others by their next access, farthest on top. Entries
    # of blocks that were accessed meanwhile lie in the past: they sink, and are never asked for
    # before every block of the future is gone, which cannot be while one is held.
    never = np.empty(num_blocks, np.int64)
    nevers = 0
    keys = np.empty(len(blocks) + 1, np.int64)
    values = np.empty(len(blocks) + 1, np.int64)
    parking = new_parking(guard, num_blocks)
    size = 0
    count = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if held[block]:
            hits[i] = 1
        else:
            if count == capacity:
                if nevers > 0:
                    nevers -= 1
                    victim = never[nevers]
                else:
                    size = unpark(parking, guard, keys, values, size, i)
                    victim, size = _pop_farthest(keys, values, size, parking, guard, i)
                if victim < 0:
                    hits[i] = REFUSED
                    refuse(guard, i)
                    continue
                held[victim] = False
                evictions += 1
            else:
                count += 1
            held[block] = True
        # Where blocks must stay all are in the heap.
        if guard is None and following[i] == len(blocks):
            never[nevers] = block
            nevers += 1
        else:
            size = heap_push(keys, values, size, -following[i], block)
    return evictions


@jit
def _pop_farthest(
    keys: Keys, values: Keys, size: int, parking: Parking, guard: Guard | None, i: int
) -> tuple[int, int]:
    """Take the block whose next access is farthest away of those that may go; -1 where none."""
    # Behind the first entry of the past all are.
    while size > 0 and -keys[0] > i and not is_full(guard, i):
        block, key = int(values[0]), keys[0]
        size = heap_pop(keys, values, size)
        if may_go(guard, block, i):
            return block, size
        park(parking, guard, block, key, block)
    return -1, size
