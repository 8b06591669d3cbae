"""LRU stack distances: how many blocks were used since a block's last access."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.stream import Counts, Ids
from kvtrace_viewer.replay.jit import jit

Words = NDArray[np.uint64]


def stack_distances(blocks: Ids, num_blocks: int) -> Ids:
    """Stack distance of every access (Mattson et al. 1970), in one pass.

    An access hits in an LRU cache of C blocks exactly where its distance is at most C: 1 is the
    block that was used just before.

    Parameters
    ----------
    blocks : numpy.ndarray
        int32 [access], ids below `num_blocks`.
    num_blocks : int
        Distinct blocks.

    Returns
    -------
    numpy.ndarray
        int32 [access]; num_blocks + 1 for the first access of a block.
    """
    found = np.empty(len(blocks), np.int32)
    _stack_distances(blocks, num_blocks, found)
    return found


@jit
def _stack_distances(blocks: Ids, num_blocks: int, found: Ids) -> None:
    # A bit for every access that is its block's last so far. Words of 64 of them are summed by a
    # Fenwick tree, which so stays in the first-level cache for a million accesses.
    words = np.zeros((len(blocks) >> 6) + 1, np.uint64)
    tree = np.zeros(len(words) + 1, np.int32)
    last = np.full(num_blocks, -1, np.int64)
    seen = 0
    for i in range(len(blocks)):
        block = blocks[i]
        before = last[block]
        if before < 0:
            seen += 1
            found[i] = num_blocks + 1
        else:
            found[i] = seen - _marked_before(words, tree, before)
            words[before >> 6] &= ~(np.uint64(1) << np.uint64(before & 63))
            _add(tree, before >> 6, -1)
        words[i >> 6] |= np.uint64(1) << np.uint64(i & 63)
        _add(tree, i >> 6, 1)
        last[block] = i


@jit
def _add(tree: Ids, word: int, change: int) -> None:
    at = word + 1
    while at < len(tree):
        tree[at] += change
        at += at & -at


@jit
def _marked_before(words: Words, tree: Ids, position: int) -> np.int64:
    count = np.int64(0)
    at = position >> 6
    while at > 0:
        count += tree[at]
        at -= at & -at
    mask = (np.uint64(1) << np.uint64(position & 63)) - np.uint64(1)
    return count + _bits(words[position >> 6] & mask)


@jit
def _bits(word: np.uint64) -> np.int64:
    """Bits that are set, summed in ever larger fields."""
    x = np.uint64(word)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@jit
def worst_so_far(distances: Ids, starts: Counts) -> None:
    """Make each distance the largest of its request up to there: that of a hit by prefix."""
    for r in range(len(starts) - 1):
        worst = 0
        for i in range(starts[r], starts[r + 1]):
            worst = max(worst, distances[i])
            distances[i] = worst
