"""ARC: adaptive replacement cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: Where a block is: nowhere, seen once or more and held (T1, T2), evicted of late (B1, B2).
_T1, _T2, _B1, _B2 = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class ARC(BlockPolicy):
    """Balance recency against frequency by which of the two the evicted blocks come back from.

    Megiddo and Modha, FAST 2003. T1 holds blocks used once, T2 those used more often, each least
    recently used first out; B1 and B2 remember what left them. A block that comes back from B1
    makes the share of T1 larger, one from B2 smaller.
    """

    name: ClassVar[str] = "arc"

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _arc(blocks, num_blocks, capacity, hits, guard)


@jit
def _arc(blocks: Ids, num_blocks: int, capacity: int, hits: Hits, guard: Guard | None) -> int:
    links = new_links(num_blocks, 5)
    where = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(5, np.int64)
    target = 0.0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        at = where[block]
        if at in (_T1, _T2):
            hits[i] = 1
            _leave(links, sizes, where, num_blocks, block)
            _join(links, sizes, where, num_blocks, block, _T2)
            continue
        if at == _B1:
            target = min(float(capacity), target + max(1.0, sizes[_B2] / sizes[_B1]))
        elif at == _B2:
            target = max(0.0, target - max(1.0, sizes[_B1] / sizes[_B2]))
        if sizes[_T1] + sizes[_T2] == capacity:
            source = _turn(sizes, target, at == _B2)
            victim = last_free(links, num_blocks + source, guard, i)
            if guard is not None and victim >= num_blocks:
                source = _T1 + _T2 - source
                victim = last_free(links, num_blocks + source, guard, i)
                if victim >= num_blocks:
                    hits[i] = REFUSED
                    refuse(guard, i)
                    continue
            # Where all were used once, none of them is remembered.
            remembered = at != 0 or sizes[_T1] < capacity
            unlink(links, victim)
            sizes[source] -= 1
            where[victim] = 0
            if remembered:
                _join(links, sizes, where, num_blocks, victim, source + 2)
            evictions += 1
        if at:
            _leave(links, sizes, where, num_blocks, block)
            _join(links, sizes, where, num_blocks, block, _T2)
            continue
        if sizes[_T1] + sizes[_B1] == capacity:
            _forget(links, sizes, where, num_blocks, _B1)
        elif sizes[_T1] + sizes[_T2] + sizes[_B1] + sizes[_B2] == 2 * capacity:
            _forget(links, sizes, where, num_blocks, _B2)
        _join(links, sizes, where, num_blocks, block, _T1)
    return evictions


@jit
def _turn(sizes: Counts, target: float, from_b2: bool) -> int:
    """The list whose turn it is to give a block up."""
    if sizes[_T1] > 0 and (sizes[_T1] > target or (from_b2 and sizes[_T1] == target)):
        return _T1
    return _T2 if sizes[_T2] > 0 else _T1


@jit
def _join(links: Ids, sizes: Counts, where: Hits, num_blocks: int, block: int, which: int) -> None:
    push_head(links, num_blocks + which, block)
    where[block] = which
    sizes[which] += 1


@jit
def _leave(links: Ids, sizes: Counts, where: Hits, num_blocks: int, block: int) -> None:
    unlink(links, block)
    sizes[where[block]] -= 1


@jit
def _forget(links: Ids, sizes: Counts, where: Hits, num_blocks: int, which: int) -> None:
    where[pop_tail(links, num_blocks + which)] = 0
    sizes[which] -= 1
