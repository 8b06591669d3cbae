"""Which tokens a cut evicts, compiled.

A score is compared as an integer of the same order, so that the least of a row is one pass of
vector instructions: a minimum of floats has to mind NaN and the sign of zero, and is not. What is
not held is barred by the greatest integer, above every score; what is held, by the least, is not.
float32 takes half the time of float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Keys = Ints | Longs

CHUNK = 128  # the least of a chunk, then of the chunks: the place is looked for in one chunk only


@jit
def ordered_keys(bits: Keys, lowest: Keys, keys: Keys) -> None:
    """Write integers that compare as the floats whose bits are given; both zeros are equal.

    `lowest` [1] is the least integer of their type.
    """
    least = lowest[0]
    for j in range(bits.shape[0]):
        keys[j] = bits[j] if bits[j] >= 0 else least - bits[j]


@jit
def cut_lowest(
    scores: Keys,
    budgets: Longs,
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    recent: Longs,
    window: int,
    joined: int,
    barred: Keys,
    counts: Longs,
    left: Longs,
    evicted_at: Ints,
    ties: Longs,
    lowest: Keys,
    keys: Keys,
) -> None:
    """Cut the caches of some budgets at every decision row of a block, lowest scores first.

    Equal scores evict the older token. Protected tokens (position < sinks, or among the last
    `recent` positions) are never candidates; sinks + recent <= limit is the caller's promise.

    Parameters
    ----------
    scores : [cut, key], the bits of floats, none of them NaN
    budgets : int64, which
    rows : int64 [cut]; limits, sinks, recent : int64 [cut, budget]
    window : keys the model itself can see, 0 for all
    joined : tokens in the cache so far (positions 0..joined-1 have been in)
    barred : as `scores`, [budget, token]; counts : int64 [budget], tokens held
    left : int64 [budget], positions below have left the window
    evicted_at : int32 [budget, token]; ties : int64 [budget]; the last five are updated
    lowest : [1], see `ordered_keys`; keys : [token], working space
    """
    last = joined
    for c in range(rows.shape[0]):
        row = rows[c]
        ordered_keys(scores[c, : row + 1], lowest, keys)
        for b in budgets:
            counts[b] += row + 1 - last
            if window > 0:
                leave_window(barred[b], counts, left, b, row + 1 - window)
            surplus = counts[b] - limits[c, b]
            if surplus > 0:
                low = max(sinks[c, b], left[b])
                high = row + 1 - recent[c, b]
                ties[b] += evict(keys, barred[b], low, high, surplus, row, evicted_at[b])
                counts[b] -= surplus
        last = row + 1


@jit
def cut_oldest(
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    window: int,
    joined: int,
    barred: Keys,
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
                leave_window(barred[b], counts, left, b, last - window)
            surplus = counts[b] - limits[c, b]
            if surplus <= 0:
                continue
            j = sinks[c, b]
            if barred[b, j] > 0:
                j = max(j, oldest[b])
            while surplus > 0:
                if barred[b, j] < 0:
                    barred[b, j] = ~barred[b, j]
                    evicted_at[b, j] = rows[c]
                    counts[b] -= 1
                    surplus -= 1
                j += 1
            oldest[b] = j


@jit
def leave_window(barred: Keys, counts: Longs, left: Longs, b: int, oldest_gone: int) -> None:
    """Drop positions <= oldest_gone, which the model itself can no longer see."""
    for j in range(left[b], oldest_gone + 1):
        if barred[j] < 0:
            barred[j] = ~barred[j]
            counts[b] -= 1
    left[b] = max(left[b], oldest_gone + 1)


@jit
def evict(
    keys: Keys, barred: Keys, low: int, high: int, surplus: int, row: int, evicted_at: Ints
) -> int:
    """Evict the `surplus` lowest held keys of positions low..high-1; return 1 on a tie."""
    if surplus == 1:
        return _evict_one(keys, barred, low, high, row, evicted_at)
    return _evict_many(keys, barred, low, high, surplus, row, evicted_at)


@jit
def _evict_one(keys: Keys, barred: Keys, low: int, high: int, row: int, evicted_at: Ints) -> int:
    """Evict the lowest; return 1 when another is equally low."""
    best, at, tie = np.int64(2**63 - 1), low, 0
    for first in range(low, high, CHUNK):
        last = min(first + CHUNK, high)
        # Slices: an index that might be negative, for all numba knows, is not vectorised.
        least = np.int64(_least(keys[first:last], barred[first:last]))
        if least < best:
            best, at, tie = least, first, 0
        elif least == best:
            tie = 1
    found = -1
    for j in range(at, min(at + CHUNK, high)):
        if keys[j] == best and barred[j] < 0:
            if found >= 0:
                tie = 1
                break
            found = j
    barred[found] = ~barred[found]
    evicted_at[found] = row
    return tie


@jit
def _least(keys: Keys, barred: Keys) -> int:
    least: int = max(keys[0], barred[0])
    for j in range(1, keys.shape[0]):
        least = min(least, max(keys[j], barred[j]))
    return least


@jit
def _evict_many(
    keys: Keys, barred: Keys, low: int, high: int, surplus: int, row: int, evicted_at: Ints
) -> int:
    """Evict the `surplus` lowest; return 1 when the margin is 0."""
    places = np.empty(max(high - low, 0), dtype=np.int64)
    count = 0
    for j in range(low, high):
        places[count] = j
        count += barred[j] < 0
    # Stable, and places ascend: among equals the older comes first.
    order = np.argsort(keys[places[:count]], kind="mergesort")
    for s in order[:surplus]:
        barred[places[s]] = ~barred[places[s]]
        evicted_at[places[s]] = row
    if surplus == count:
        return 0
    return int(keys[places[order[surplus - 1]]] == keys[places[order[surplus]]])
