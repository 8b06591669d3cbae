"""ARC: adaptive replacement cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
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

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _arc(blocks, num_blocks, capacity, hits)


@jit
def _arc(blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
    links = new_links(num_blocks, 5)
    where = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(5, np.int64)
    target = 0.0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
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
        if at:
            evictions += _replace(links, sizes, where, num_blocks, capacity, target, at == _B2)
            _leave(links, sizes, where, num_blocks, block)
            _join(links, sizes, where, num_blocks, block, _T2)
            continue
        if sizes[_T1] + sizes[_B1] == capacity:
            if sizes[_T1] < capacity:
                _drop(links, sizes, where, num_blocks, _B1)
                evictions += _replace(links, sizes, where, num_blocks, capacity, target, False)
            else:
                _drop(links, sizes, where, num_blocks, _T1)
                evictions += 1
        elif sizes.sum() >= capacity:
            if sizes.sum() == 2 * capacity:
                _drop(links, sizes, where, num_blocks, _B2)
            evictions += _replace(links, sizes, where, num_blocks, capacity, target, False)
        _join(links, sizes, where, num_blocks, block, _T1)
    return evictions


@jit
def _replace(
    links: Ids,
    sizes: Counts,
    where: Hits,
    num_blocks: int,
    capacity: int,
    target: float,
    from_b2: bool,
) -> int:
    """Evict into B1 or B2 where the cache is full; returns the evictions."""
    if sizes[_T1] + sizes[_T2] < capacity:
        return 0
    if sizes[_T1] > 0 and (sizes[_T1] > target or (from_b2 and sizes[_T1] == target)):
        source = _T1
    elif sizes[_T2] > 0:
        source = _T2
    else:
        source = _T1
    victim = pop_tail(links, num_blocks + source)
    sizes[source] -= 1
    _join(links, sizes, where, num_blocks, victim, source + 2)
    return 1


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
def _drop(links: Ids, sizes: Counts, where: Hits, num_blocks: int, which: int) -> None:
    where[pop_tail(links, num_blocks + which)] = 0
    sizes[which] -= 1
