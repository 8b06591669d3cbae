"""S3-FIFO: three first-in-first-out queues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: Where a block is: nowhere, in the small queue, in the main one, or remembered.
_SMALL, _MAIN, _GHOST = 1, 2, 3
#: Uses are counted so far; each is another round in the main queue.
_MOST = 3


@dataclass(frozen=True, kw_only=True)
class S3FIFO(BlockPolicy):
    """Filter out one-hit wonders in a small queue; remember them, in case they come back.

    Yang et al., SOSP 2023, "FIFO queues are all you need for cache eviction". A block leaves the
    small queue for the main one when it was used often enough, else it is evicted and its id
    remembered; a remembered block goes straight to the main queue, where each use buys another
    round.

    The paper leaves the filling of an empty cache open: what the small queue has no room for
    enters the main queue, until the cache is full for the first time. An id that comes back
    makes room among the remembered at once. Hits on the reference streams are the independent
    simulator's, or within 0.05 points of the hit ratio.
    """

    name: ClassVar[str] = "s3fifo"

    small: float = parameter(0.1, "share of the capacity that is the small queue's", "share", 0)
    ghost: float = parameter(0.9, "ids that are remembered, of the capacity", "share", 0)
    threshold: int = parameter(2, "uses in the small queue that lead to the main one", "uses", 1)

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        small, ghost = int(capacity * self.small), int(capacity * self.ghost)
        return _s3fifo(blocks, num_blocks, capacity, small, ghost, self.threshold, hits, guard)


@jit
def _s3fifo(
    blocks: Ids,
    num_blocks: int,
    capacity: int,
    small: int,
    ghost: int,
    threshold: int,
    hits: Hits,
    guard: Guard | None,
) -> int:
    links = new_links(num_blocks, 4)
    where = np.zeros(num_blocks, np.uint8)
    uses = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(4, np.int64)
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        at = where[block]
        if at in (_SMALL, _MAIN):
            hits[i] = 1
            uses[block] = min(uses[block] + 1, _MOST)
            continue
        if at == _GHOST:
            unlink(links, block)
            sizes[_GHOST] -= 1
        if sizes[_SMALL] + sizes[_MAIN] == capacity:
            main = capacity - small
            if not _evict(links, where, uses, sizes, num_blocks, main, ghost, threshold, guard, i):
                # What was remembered of it is forgotten.
                where[block] = 0
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            evictions += 1
        filling = evictions == 0 and sizes[_SMALL] >= small
        uses[block] = 0
        joins = _MAIN if at == _GHOST or filling else _SMALL
        _join(links, where, sizes, num_blocks, block, joins)
    return evictions


@jit
def _join(links: Ids, where: Hits, sizes: Counts, num_blocks: int, block: int, which: int) -> None:
    push_head(links, num_blocks + which, block)
    where[block] = which
    sizes[which] += 1


@jit
def _evict(
    links: Ids,
    where: Hits,
    uses: Hits,
    sizes: Counts,
    num_blocks: int,
    main: int,
    ghost: int,
    threshold: int,
    guard: Guard | None,
    i: int,
) -> bool:
    """Go through the queues until one block is gone; blocks that must stay keep their places.

    Where none may go in the queue whose turn it is, the other's turn comes.
    """
    while True:
        source = _MAIN if sizes[_MAIN] > main or sizes[_SMALL] == 0 else _SMALL
        block = last_free(links, num_blocks + source, guard, i)
        if block >= num_blocks:
            source = _SMALL if source == _MAIN else _MAIN
            block = last_free(links, num_blocks + source, guard, i)
            if block >= num_blocks:
                return False
        unlink(links, block)
        where[block] = 0
        sizes[source] -= 1
        if source == _MAIN:
            if uses[block] == 0:
                return True
            uses[block] -= 1
            _join(links, where, sizes, num_blocks, block, _MAIN)
            continue
        if uses[block] >= threshold:
            uses[block] = 0
            _join(links, where, sizes, num_blocks, block, _MAIN)
            continue
        if ghost > 0:
            if sizes[_GHOST] == ghost:
                where[pop_tail(links, num_blocks + _GHOST)] = 0
                sizes[_GHOST] -= 1
            _join(links, where, sizes, num_blocks, block, _GHOST)
        return True
