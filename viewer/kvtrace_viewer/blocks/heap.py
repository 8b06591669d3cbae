"""A binary heap of (key, value), the least on top, in two arrays that the caller owns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Keys = NDArray[np.int64]


@jit
def heap_push(keys: Keys, values: Keys, size: int, key: int, value: int) -> int:
    """Add an entry; returns the new size."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] < key or (keys[parent] == key and values[parent] <= value):
            break
        keys[at] = keys[parent]
        values[at] = values[parent]
        at = parent
    keys[at] = key
    values[at] = value
    return size + 1


@jit
def heap_pop(keys: Keys, values: Keys, size: int) -> int:
    """Drop the top entry (read keys[0] and values[0] before); returns the new size."""
    size -= 1
    key, value = keys[size], values[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _less(keys, values, child + 1, keys[child], values[child]):
            child += 1
        if not _less(keys, values, child, key, value):
            break
        keys[at] = keys[child]
        values[at] = values[child]
        at = child
    keys[at] = key
    values[at] = value
    return size


@jit
def _less(keys: Keys, values: Keys, at: int, key: int, value: int) -> bool:
    return bool(keys[at] < key or (keys[at] == key and values[at] < value))
