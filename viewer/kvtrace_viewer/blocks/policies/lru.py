"""Least recently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class LRU(BlockPolicy):
    """Evict the block whose last access is longest ago."""

    name: ClassVar[str] = "lru"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _lru(blocks, num_blocks, capacity, hits, guard)


@jit
def _lru(blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None) -> int:
    links = new_links(num_blocks, 1)
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if links[block, 0] >= 0:
            hits[i] = 1
            unlink(links, block)
        elif held == capacity:
            victim = last_free(links, num_blocks, guard, i)
            if victim == num_blocks:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            unlink(links, victim)
            evictions += 1
        else:
            held += 1
        push_head(links, num_blocks, block)
    return evictions
