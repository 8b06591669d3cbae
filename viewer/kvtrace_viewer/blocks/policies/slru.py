"""Segmented LRU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits, parameter
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

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        return _slru(blocks, num_blocks, capacity, min(self.segments, capacity), hits)


@jit
def _slru(blocks: Ids, num_blocks: int, capacity: int, segments: int, hits: Hits) -> int:
    links = new_links(num_blocks, segments)
    level = np.full(num_blocks, -1, np.int64)
    sizes = np.zeros(segments, np.int64)
    limit = capacity // segments
    held = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        if level[block] >= 0:
            hits[i] = 1
            unlink(links, block)
            sizes[level[block]] -= 1
            joins = min(level[block] + 1, segments - 1)
            push(links, level, sizes, num_blocks, block, joins)
            gone = lower(links, level, sizes, num_blocks, joins, limit)
            held -= gone
            evictions += gone
            continue
        if held == capacity:
            level[pop_lowest(links, sizes, num_blocks)] = -1
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
def lower(links: Ids, level: Counts, sizes: Counts, first: int, segment: int, limit: int) -> int:
    """Push what is beyond the limit down from a segment, out of the lowest; blocks gone."""
    gone = 0
    while segment >= 0 and sizes[segment] > limit:
        block = pop_tail(links, first + segment)
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
def pop_lowest(links: Ids, sizes: Counts, first: int) -> int:
    """Take the block out that is at the tail of the lowest segment that has any."""
    segment = 0
    while sizes[segment] == 0:
        segment += 1
    sizes[segment] -= 1
    return pop_tail(links, first + segment)


@jit
def lowest_with_room(sizes: Counts, limit: int) -> int:
    """The lowest segment with room; the lowest of all where none has."""
    for segment in range(len(sizes)):
        if sizes[segment] < limit:
            return segment
    return 0
