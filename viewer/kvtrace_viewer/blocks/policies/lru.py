"""Least recently used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class LRU(BlockPolicy):
    """Evict the block whose last access is longest ago."""

    name: ClassVar[str] = "lru"

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _lru(blocks, num_blocks, capacity, hits)


@jit
def _lru(blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    links = new_links(num_blocks, 1)
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if links[block, 0] >= 0:
            hits[i] = 1
            unlink(links, block)
        elif held == capacity:
            pop_tail(links, num_blocks)
            evictions += 1
        else:
            held += 1
        push_head(links, num_blocks, block)
    return evictions
