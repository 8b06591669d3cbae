"""Which tokens a cut evicts, compiled.

A score is compared as an integer of the same order, so that the least of a row is one pass of
vector instructions: a minimum of floats has to mind NaN and the sign of zero, and is not. What is
not held is `GONE`, above every score.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

HELD = np.int64(-(2**63))
GONE = np.int64(2**63 - 1)
CHUNK = 128  # the least of a chunk, then of the chunks: the place is looked for in one chunk only


@jit
def ordered_keys(line: Doubles, count: int, keys: Longs) -> None:
    """Write to keys[:count] integers that compare as `line` does; both zeros are equal."""
    bits, keys = line[:count].view(np.int64), keys[:count]
    for j in range(bits.shape[0]):
        i = np.int64(0) if bits[j] == HELD else bits[j]  # those are the bits of -0.0, too
        keys[j] = i ^ ((i >> 63) & GONE)


@jit
def cut_lowest(
    scores: Doubles,
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    recent: Longs,
    window: int,
    joined: int,
    gone: Longs,
    counts: Longs,
    left: Longs,
    evicted_at: Ints,
    ties: Longs,
    keys: Longs,
) -> None:
    """Cut every budget's cache at every decision row of a block, lowest scores first.

    Equal scores evict the older token. Protected tokens (position < sinks, or among the last
    `recent` positions) are never candidates; sinks + recent <= limit is the caller's promise.

    Parameters
    ----------
    scores : float64 [1 or budget, cut, key]
    rows : int64 [cut]; limits, sinks, recent : int64 [cut, budget]
    window : keys the model itself can see, 0 for all
    joined : tokens in the cache so far (positions 0..joined-1 have been in)
    gone : int64 [budget, token], HELD or GONE; counts : int64 [budget], tokens held
    left : int64 [budget], positions below have left the window
    evicted_at : int32 [budget, token]; ties : int64 [budget]; the last five are updated
    keys : int64 [token], working space
    """
    last = joined
    for c in range(rows.shape[0]):
        row = rows[c]
        for b in range(counts.shape[0]):
            if b == 0 or scores.shape[0] > 1:
                ordered_keys(scores[b if scores.shape[0] > 1 else 0, c], row + 1, keys)
            counts[b] += row + 1 - last
            if window > 0:
                leave_window(gone[b], counts, left, b, row + 1 - window)
            surplus = counts[b] - limits[c, b]
            if surplus > 0:
                low = max(sinks[c, b], left[b])
                high = row + 1 - recent[c, b]
                ties[b] += evict(keys, gone[b], low, high, surplus, row, evicted_at[b])
                counts[b] -= surplus
        last = row + 1


@jit
def cut_oldest(
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    window: int,
    joined: int,
    gone: Longs,
    counts: Longs,
    left: Longs,
    oldest: Longs,
    evicted_at: Ints,
) -> None:
    """Cut as `cut_lowest` does where the score is the position, without looking for it.

    `oldest` int64 [budget] is the position after the last evicted one.
    """
    for b in range(counts.shape[0]):
        last = joined
        for c in range(rows.shape[0]):
            counts[b] += rows[c] + 1 - last
            last = rows[c] + 1
            if window > 0:
                leave_window(gone[b], counts, left, b, last - window)
            surplus = counts[b] - limits[c, b]
            if surplus <= 0:
                continue
            j = sinks[c, b]
            if gone[b, j] == GONE:
                j = max(j, oldest[b])
            while surplus > 0:
                if gone[b, j] == HELD:
                    gone[b, j] = GONE
                    evicted_at[b, j] = rows[c]
                    counts[b] -= 1
                    surplus -= 1
                j += 1
            oldest[b] = j


@jit
def leave_window(gone: Longs, counts: Longs, left: Longs, b: int, oldest_gone: int) -> None:
    """Drop positions <= oldest_gone, which the model itself can no longer see."""
    for j in range(left[b], oldest_gone + 1):
        if gone[j] == HELD:
            gone[j] = GONE
            counts[b] -= 1
    left[b] = max(left[b], oldest_gone + 1)


@jit
def evict(
    keys: Longs, gone: Longs, low: int, high: int, surplus: int, row: int, evicted_at: Ints
) -> int:
    """Evict the `surplus` lowest held keys of positions low..high-1; return 1 on a tie."""
    if surplus == 1:
        return _evict_one(keys, gone, low, high, row, evicted_at)
    return _evict_many(keys, gone, low, high, surplus, row, evicted_at)


@jit
def _evict_one(keys: Longs, gone: Longs, low: int, high: int, row: int, evicted_at: Ints) -> int:
    """Evict the lowest; return 1 when another is equally low."""
    best, at, tie = GONE, low, 0
    for first in range(low, high, CHUNK):
        last = min(first + CHUNK, high)
        # Slices: an index that might be negative, for all numba knows, is not vectorised.
        least = _least(keys[first:last], gone[first:last])
        if least < best:
            best, at, tie = least, first, 0
        elif least == best:
            tie = 1
    found = -1
    for j in range(at, min(at + CHUNK, high)):
        if max(keys[j], gone[j]) == best:
            if found >= 0:
                tie = 1
                break
            found = j
    gone[found] = GONE
    evicted_at[found] = row
    return tie


@jit
def _least(keys: Longs, gone: Longs) -> np.int64:
    least = GONE
    for j in range(keys.shape[0]):
        least = min(least, max(keys[j], gone[j]))
    return least


@jit
def _evict_many(
    keys: Longs, gone: Longs, low: int, high: int, surplus: int, row: int, evicted_at: Ints
) -> int:
    """Evict the `surplus` lowest; return 1 when the margin is 0."""
    places = np.empty(max(high - low, 0), dtype=np.int64)
    count = 0
    for j in range(low, high):
        places[count] = j
        count += gone[j] == HELD
    # Stable, and places ascend: among equals the older comes first.
    order = np.argsort(keys[places[:count]], kind="mergesort")
    for s in order[:surplus]:
        gone[places[s]] = GONE
        evicted_at[places[s]] = row
    if surplus == count:
        return 0
    return int(keys[places[order[surplus - 1]]] == keys[places[order[surplus]]])
