"""2Q: a probation queue, and a memory of what left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: Where a block is: nowhere, on probation, remembered, or in the main queue.
_IN, _OUT, _MAIN = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class TwoQ(BlockPolicy):
    """Keep new blocks apart; only those asked for again after they left reach the main queue.

    Johnson and Shasha, VLDB 1994, the full version: A1in is first in first out, A1out remembers
    ids of blocks that left it, Am is least recently used first out. A hit in A1in moves nothing.
    """

    name: ClassVar[str] = "two_q"

    probation: float = parameter(0.25, "share of the capacity that is A1in's (Kin)", "share", 0)
    remembered: float = parameter(0.5, "ids that A1out holds, of the capacity (Kout)", "share", 0)

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        kin, kout = int(capacity * self.probation), int(capacity * self.remembered)
        return _two_q(blocks, num_blocks, capacity, kin, kout, hits)


@jit
def _two_q(blocks: Ids, num_blocks: int, capacity: int, kin: int, kout: int, hits: Hits) -> int:
    links = new_links(num_blocks, 4)
    where = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(4, np.int64)
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        at = where[block]
        if at == _IN:
            hits[i] = 1
            continue
        if at == _MAIN:
            hits[i] = 1
            unlink(links, block)
            push_head(links, num_blocks + _MAIN, block)
            continue
        if at == _OUT:
            # Taken out before the cache makes room: room is made in A1out too.
            unlink(links, block)
            sizes[_OUT] -= 1
        if sizes[_IN] + sizes[_MAIN] == capacity:
            _make_room(links, sizes, where, num_blocks, kin, kout)
            evictions += 1
        joins = _MAIN if at == _OUT else _IN
        push_head(links, num_blocks + joins, block)
        where[block] = joins
        sizes[joins] += 1
    return evictions


@jit
def _make_room(
    links: Ids, sizes: Counts, where: Hits, num_blocks: int, kin: int, kout: int
) -> None:
    if sizes[_IN] > kin or sizes[_MAIN] == 0:
        victim = pop_tail(links, num_blocks + _IN)
        sizes[_IN] -= 1
        where[victim] = 0
        if kout > 0:
            if sizes[_OUT] == kout:
                where[pop_tail(links, num_blocks + _OUT)] = 0
                sizes[_OUT] -= 1
            push_head(links, num_blocks + _OUT, victim)
            where[victim] = _OUT
            sizes[_OUT] += 1
    else:
        where[pop_tail(links, num_blocks + _MAIN)] = 0
        sizes[_MAIN] -= 1
