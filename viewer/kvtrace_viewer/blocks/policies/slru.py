"""Segmented LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class SLRU(BlockPolicy):
    """Several LRU lists one above the other; a hit lifts a block by one, overflow lowers it.

    Karedla et al. 1994, with segments of one size. A new block enters the lowest segment with
    room, and the lowest of all where there is none; what the lowest pushes out is evicted. Places
    that do not divide evenly are used by new blocks, until a hit makes the lowest segment give up
    all beyond its size.
    """

    name: ClassVar[str] = "slru"

    segments: int = parameter(4, "LRU lists", "lists", 1)

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _slru(blocks, num_blocks, capacity, min(self.segments, capacity), hits, guard)


@jit
def _slru(
    blocks: Ids, num_blocks: int, capacity: int, segments: int, hits: Hits, guard: Guard | None
) -> int:
    links = new_links(num_blocks, segments)
    level = np.full(num_blocks, -1, np.int64)
    sizes = np.zeros(segments, np.int64)
    limit = capacity // segments
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        if level[block] >= 0:
            hits[i] = 1
            unlink(links, block)
            sizes[level[block]] -= 1
            joins = min(level[block] + 1, segments - 1)
            push(links, level, sizes, num_blocks, block, joins)
            gone = lower(links, level, sizes, num_blocks, joins, limit, guard, i)
            held -= gone
            evictions += gone
            continue
        if held == capacity:
            victim = pop_lowest(links, sizes, num_blocks, guard, i)
            if victim < 0:
                hits[i] = REFUSED
                refuse(guard, i)
                continue
            level[victim] = -1
            held -= 1
            evictions += 1
        push(links, level, sizes, num_blocks, block, lowest_with_room(sizes, limit))
        held += 1
    return evictions


@jit
def push(links: Ids, level: Counts, sizes: Counts, first: int, block: int, joins: int) -> None:
    """Put a block at the head of a segment; `first` is the sentinel of the lowest."""
    push_head(links, first + joins, block)
    level[block] = joins
    sizes[joins] += 1


@jit
def lower(
    links: Ids,
    level: Counts,
    sizes: Counts,
    first: int,
    segment: int,
    limit: int,
    guard: Guard | None,
    i: int,
) -> int:
    """Push what is beyond the limit down from a segment, out of the lowest; blocks gone.

    The lowest keeps what it has too many of where no block in it may go, and every segment keeps
    pinned blocks that are set apart.
    """
    gone = 0
    while segment >= 0 and sizes[segment] > limit:
        block = int(links[first + segment, 0])
        if guard is not None:
            if segment == 0:
                block = last_free(links, first, guard, i)
            if block == first + segment:
                break
        unlink(links, block)
        sizes[segment] -= 1
        if segment > 0:
            push(links, level, sizes, first, block, segment - 1)
        else:
            level[block] = -1
            gone += 1
        if sizes[segment] <= limit:
            segment -= 1
    return gone


@jit
def pop_lowest(links: Ids, sizes: Counts, first: int, guard: Guard | None, i: int) -> int:
    """Take the block out that is nearest the tail of the lowest segment; -1 where none may go."""
    segment = 0
    while sizes[segment] == 0:
        segment += 1
    block = last_free(links, first + segment, guard, i)
    if guard is not None:
        while block == first + segment and segment + 1 < len(sizes):
            segment += 1
            block = last_free(links, first + segment, guard, i)
        if block == first + segment:
            return -1
    unlink(links, block)
    sizes[segment] -= 1
    return block


@jit
def lowest_with_room(sizes: Counts, limit: int) -> int:
    """The lowest segment with room; the lowest of all where none has."""
    for segment in range(len(sizes)):
        if sizes[segment] < limit:
            return segment
    return 0
