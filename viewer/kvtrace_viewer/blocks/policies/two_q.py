"""2Q: a probation queue, and a memory of what left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, parameter
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

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        kin, kout = int(capacity * self.probation), int(capacity * self.remembered)
        return _two_q(blocks, num_blocks, capacity, kin, kout, hits, guard)


@jit
def _two_q(
    blocks: Ids,
    num_blocks: int,
    capacity: int,
    kin: int,
    kout: int,
    hits: Hits,
    guard: Guard | None,
) -> int:
    links = new_links(num_blocks, 4)
    where = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(4, np.int64)
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
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
            if not _make_room(links, sizes, where, num_blocks, kin, kout, guard, i):
                # What was remembered of it is forgotten.
                where[block] = 0
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            evictions += 1
        joins = _MAIN if at == _OUT else _IN
        push_head(links, num_blocks + joins, block)
        where[block] = joins
        sizes[joins] += 1
    return evictions


@jit
def _make_room(
    links: Ids,
    sizes: Counts,
    where: Hits,
    num_blocks: int,
    kin: int,
    kout: int,
    guard: Guard | None,
    i: int,
) -> bool:
    """Evict a block, from the other queue where none may go in the one whose turn it is."""
    source = _IN if sizes[_IN] > kin or sizes[_MAIN] == 0 else _MAIN
    victim = last_free(links, num_blocks + source, guard, i)
    if victim >= num_blocks:
        source = _MAIN if source == _IN else _IN
        victim = last_free(links, num_blocks + source, guard, i)
        if victim >= num_blocks:
            return False
    unlink(links, victim)
    sizes[source] -= 1
    where[victim] = 0
    if source == _IN and kout > 0:
        if sizes[_OUT] == kout:
            where[pop_tail(links, num_blocks + _OUT)] = 0
            sizes[_OUT] -= 1
        push_head(links, num_blocks + _OUT, victim)
        where[victim] = _OUT
        sizes[_OUT] += 1
    return True
