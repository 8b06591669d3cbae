"""What a heap gave up and must stay is parked until it may go, and then goes back.

So an entry is looked at once for as long as its block is held, not at every eviction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvtrace_viewer.blocks.guard import FOREVER, Guard
from kvtrace_viewer.blocks.heap import Keys, heap_pop, heap_push
from kvtrace_viewer.blocks.policy import Hits
from kvtrace_viewer.replay.jit import jit


class Parking(NamedTuple):
    """Entries of a heap beside it, at most one a block.

    Attributes
    ----------
    until, blocks : numpy.ndarray
        int64 [entry], a heap: the access from which on the block may go.
    keys, values : numpy.ndarray
        int64 [block], its entry; that of its last access, where there were several.
    parked : numpy.ndarray
        uint8 [block], whether it has one here.
    size : numpy.ndarray
        int64 [1], entries.
    """

    until: Keys
    blocks: Keys
    keys: Keys
    values: Keys
    parked: Hits
    size: Keys


@jit
def new_parking(guard: Guard | None, num_blocks: int) -> Parking:
    """An empty one; of no size where nothing must stay."""
    room = 0 if guard is None else num_blocks
    return Parking(
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.zeros(room, np.uint8),
        np.zeros(1, np.int64),
    )


@jit
def park(parking: Parking, guard: Guard | None, block: int, key: int, value: int) -> None:
    """Put an entry aside; that of a pinned block is forgotten, since it never goes."""
    if guard is None or guard.stays[block] == FOREVER:
        return
    parking.keys[block] = key
    parking.values[block] = value
    if not parking.parked[block]:
        parking.parked[block] = 1
        until, blocks, size = parking.until, parking.blocks, parking.size
        size[0] = heap_push(until, blocks, size[0], guard.stays[block], block)


@jit
def unpark(
    parking: Parking, guard: Guard | None, keys: Keys, values: Keys, size: int, i: int
) -> int:
    """Put what may go at access `i` back into its heap; returns the heap's new size."""
    if guard is not None:
        until, blocks, left = parking.until, parking.blocks, parking.size
        while left[0] > 0 and until[0] <= i:
            block = blocks[0]
            left[0] = heap_pop(until, blocks, left[0])
            parking.parked[block] = 0
            size = heap_push(keys, values, size, parking.keys[block], parking.values[block])
    return size
