"""Where every block lies: a heap for each tier, compiled.

Nothing here knows of time; `schedule.py` asks what lies where, moves it, and counts the seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.heap import heap_pop, heap_push
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.tiers.order import key_of

Longs = NDArray[np.int64]


class Residency(NamedTuple):
    """What lies where; arrays only, so that compiled code can take it.

    Attributes
    ----------
    held : uint8 [tier, block]
        Whether the tier has the block.
    filled, capacity : int64 [tier]
        Blocks that it has, and that fit.
    key, came, uses : int64 [tier, block]
        The policy's key of each held block, the access that brought it in, uses since.
    pinned : int64 [block]
        The request that needs the block now: it is not given up by the first tier.
    heap_keys, heap_blocks : int64 [tier, entry]
        Heaps with one entry for each access; those whose key is no longer the block's are stale.
    heap_size : int64 [tier]
    set_aside : int64 [block]
        Room for what `victim` passes over.
    moved : int32 [move, 3]
        The request in which a block came to a tier or left one, the block, and the tier: t where
        it came, -1 - t where it left. As many as there is room for.
    moves : int64 [2]
        How many there were, and the request that runs.
    """

    held: NDArray[np.uint8]
    filled: Longs
    capacity: Longs
    key: Longs
    came: Longs
    uses: Longs
    pinned: Longs
    heap_keys: Longs
    heap_blocks: Longs
    heap_size: Longs
    set_aside: Longs
    moved: NDArray[np.int32]
    moves: Longs


#: Moves that are kept for a map of who lay where.
MAX_MOVES = 16_000_000


def empty(num_blocks: int, capacities: list[int], entries: int) -> Residency:
    """Tiers with nothing in them.

    Parameters
    ----------
    num_blocks : int
        Distinct blocks.
    capacities : list of int
        Blocks that fit in each tier.
    entries : int
        Heap entries at first; heaps are swept when full.
    """
    shape = (len(capacities), num_blocks)
    # A sweep leaves one entry a held block, so twice that many never have to be swept at once.
    size = max(entries, 2 * num_blocks + 16)
    return Residency(
        held=np.zeros(shape, np.uint8),
        filled=np.zeros(len(capacities), np.int64),
        capacity=np.array(capacities, np.int64),
        key=np.zeros(shape, np.int64),
        came=np.zeros(shape, np.int64),
        uses=np.zeros(shape, np.int64),
        pinned=np.full(num_blocks, -1, np.int64),
        heap_keys=np.empty((len(capacities), size), np.int64),
        heap_blocks=np.empty((len(capacities), size), np.int64),
        heap_size=np.zeros(len(capacities), np.int64),
        # A block may have entries of one key twice.
        set_aside=np.empty(size, np.int64),
        # An access moves a block in and another out of each tier, at most; memory that is not
        # written to is not taken.
        moved=np.empty((min(MAX_MOVES, 4 * entries * len(capacities)), 3), np.int32),
        moves=np.zeros(2, np.int64),
    )


@jit
def touch(
    at: Residency, tier: int, block: int, order: int, access: int, index: int, following: int
) -> None:
    """Note a use of a block in a tier that has it."""
    at.uses[tier, block] += 1
    key = key_of(order, access, at.came[tier, block], at.uses[tier, block], index, following)
    if key == at.key[tier, block] and at.uses[tier, block] > 1:
        # Its entry is still good; a popular block under fifo would fill the heap with itself.
        return
    at.key[tier, block] = key
    if at.heap_size[tier] == at.heap_keys.shape[1]:
        _sweep(at, tier)
    at.heap_size[tier] = heap_push(
        at.heap_keys[tier], at.heap_blocks[tier], at.heap_size[tier], at.key[tier, block], block
    )


@jit
def put(
    at: Residency, tier: int, block: int, order: int, access: int, index: int, following: int
) -> None:
    """Put a block into a tier that has room for it and has it not."""
    at.held[tier, block] = 1
    at.filled[tier] += 1
    at.came[tier, block] = access
    at.uses[tier, block] = 0
    _note(at, block, tier)
    touch(at, tier, block, order, access, index, following)


@jit
def take(at: Residency, tier: int, block: int) -> None:
    """Take a block out of a tier that has it."""
    at.held[tier, block] = 0
    at.filled[tier] -= 1
    _note(at, block, -1 - tier)


@jit
def _note(at: Residency, block: int, tier: int) -> None:
    if at.moves[0] < len(at.moved):
        at.moved[at.moves[0], 0] = at.moves[1]
        at.moved[at.moves[0], 1] = block
        at.moved[at.moves[0], 2] = tier
    at.moves[0] += 1


@jit
def victim(at: Residency, tier: int, request: int) -> int:
    """The block that a tier gives up next, which is not taken out yet; -1 where all are needed."""
    keys, blocks = at.heap_keys[tier], at.heap_blocks[tier]
    size = at.heap_size[tier]
    waiting = 0
    found = -1
    while size > 0:
        key, block = keys[0], blocks[0]
        size = heap_pop(keys, blocks, size)
        if at.held[tier, block] == 0 or at.key[tier, block] != key:
            continue
        if tier == 0 and at.pinned[block] == request:
            at.set_aside[waiting] = block
            waiting += 1
            continue
        found = block
        break
    for i in range(waiting):
        size = heap_push(keys, blocks, size, at.key[tier, at.set_aside[i]], at.set_aside[i])
    at.heap_size[tier] = size
    return found


@jit
def _sweep(at: Residency, tier: int) -> None:
    """Drop a heap's stale entries."""
    keys, blocks = at.heap_keys[tier], at.heap_blocks[tier]
    old = at.heap_size[tier]
    size = 0
    seen = np.zeros(at.held.shape[1], np.uint8)
    for i in range(old):
        block = blocks[i]
        if at.held[tier, block] == 1 and seen[block] == 0:
            seen[block] = 1
            # Written behind what has been read: size <= i.
            size = heap_push(keys, blocks, size, at.key[tier, block], block)
    at.heap_size[tier] = size
