"""Which tokens a cut evicts, compiled.

A score is compared as an integer of the same order, so that the least of a row is one pass of
vector instructions: a minimum of floats has to mind NaN and the sign of zero, and is not. Of
float64 the upper halves are compared first, and the whole of those that share the least one. What
is not held is barred by the greatest integer, above every score; what is held, by the least, is
not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.vectors import COMPARED, equal_held, least_held, lowest_bit

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Bits = Ints | Longs

BARRED, HELD = np.int32(2**31 - 1), np.int32(-(2**31))
CHUNK = 8 * COMPARED  # the least of a chunk, then of the chunks: one chunk is looked through


@jit
def ordered(bits: int, least: int) -> int:
    """Return an integer that compares as the float whose bits are given; both zeros are equal.

    `least` is the least integer of their type.
    """
    return bits if bits >= 0 else least - bits


@jit
def upper_keys(bits: Bits, least: int, shift: int, keys: Ints) -> None:
    """Write the upper 32 bits of the floats' `ordered` integers."""
    for j in range(bits.shape[0]):
        keys[j] = ordered(bits[j], least) >> shift


@jit
def cut_lowest(
    scores: Bits,
    of_budget: Longs,
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    recent: Longs,
    window: int,
    joined: int,
    barred: Ints,
    counts: Longs,
    left: Longs,
    evicted_at: Ints,
    ties: Longs,
    least: int,
    keys: Ints,
) -> None:
    """Cut the caches of some budgets at every decision row of a block, lowest scores first.

    Equal scores evict the older token. Protected tokens (position < sinks, or among the last
    `recent` positions) are never candidates; sinks + recent <= limit is the caller's promise.

    Parameters
    ----------
    scores : [matrix, cut, key], the bits of floats, none of them NaN
    of_budget : int64 [budget], the matrix each budget is cut by; -1: by none of them
    rows : int64 [cut]; limits, sinks, recent : int64 [cut, budget]
    window : keys the model itself can see, 0 for all
    joined : tokens in the cache so far (positions 0..joined-1 have been in)
    barred : int32 [budget, token], BARRED or HELD; counts : int64 [budget], tokens held
    left : int64 [budget], positions below have left the window
    evicted_at : int32 [budget, token]; ties : int64 [budget]; the last five are updated
    least : see `ordered`; keys : int32 [token], working space
    """
    shift = 8 * scores.itemsize - 32
    for m in range(scores.shape[0]):
        budgets = np.flatnonzero(of_budget == m)
        last = joined
        for c in range(rows.shape[0]):
            row = rows[c]
            bits = scores[m, c, : row + 1]
            upper_keys(bits, least, shift, keys)
            for b in budgets:
                counts[b] += row + 1 - last
                if window > 0:
                    leave_window(barred[b], counts, left, int(b), row + 1 - window)
                surplus = counts[b] - limits[c, b]
                if surplus > 0:
                    low, high = max(sinks[c, b], left[b]), row + 1 - recent[c, b]
                    ties[b] += _evict(
                        bits, least, keys, barred[b], low, high, surplus, row, evicted_at[b]
                    )
                    counts[b] -= surplus
            last = row + 1


@jit
def _evict(
    bits: Bits,
    least: int,
    keys: Ints,
    barred: Ints,
    low: int,
    high: int,
    surplus: int,
    row: int,
    evicted_at: Ints,
) -> int:
    """Evict the `surplus` lowest held of positions low..high-1; return 1 when the margin is 0."""
    if surplus == 1:
        return _evict_one(bits, least, keys, barred, low, high, row, evicted_at)
    return evict_many(bits, least, barred, low, high, surplus, row, evicted_at)


@jit
def cut_oldest(
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    window: int,
    joined: int,
    barred: Ints,
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
def leave_window(barred: Ints, counts: Longs, left: Longs, b: int, oldest_gone: int) -> None:
    """Drop positions <= oldest_gone, which the model itself can no longer see."""
    for j in range(left[b], oldest_gone + 1):
        if barred[j] < 0:
            barred[j] = ~barred[j]
            counts[b] -= 1
    left[b] = max(left[b], oldest_gone + 1)


@jit
def _evict_one(
    bits: Bits,
    least: int,
    keys: Ints,
    barred: Ints,
    low: int,
    high: int,
    row: int,
    evicted_at: Ints,
) -> int:
    """Evict the lowest held of positions low..high-1; return 1 when another is equally low."""
    lowest, at, until = _least_upper(keys, barred, low, high)
    found, best, tie = -1, ordered(bits[0], least), 0
    is_whole = bits.itemsize == keys.itemsize  # then the first is it, and a second makes a tie
    whole = low + (high - low) // COMPARED * COMPARED
    for first in range(at, until, COMPARED):
        if first < whole:
            places = equal_held(keys, barred, first, lowest)
        else:
            places = np.uint64(0)
            for j in range(first, until):
                places |= np.uint64(max(keys[j], barred[j]) == lowest) << np.uint64(j - first)
        while places != np.uint64(0) and not (is_whole and tie):
            j = first + lowest_bit(places)
            places &= places - np.uint64(1)
            key = ordered(bits[j], least)
            if found < 0 or key < best:
                found, best, tie = j, key, 0
            elif key == best:
                tie = 1
        if is_whole and tie:
            break
    barred[found] = BARRED
    evicted_at[found] = row
    return tie


@jit
def _least_upper(keys: Ints, barred: Ints, low: int, high: int) -> tuple[int, int, int]:
    """Return the least held key, and from where to where all that are equal to it stand."""
    lowest, at, until = int(BARRED), low, low
    whole = low + (high - low) // COMPARED * COMPARED
    for first in range(low, whole, CHUNK):
        last = min(first + CHUNK, whole)
        found = least_held(keys, barred, first, last)
        if found < lowest:
            lowest, at = found, first
        if found == lowest:
            until = last
    for j in range(whole, high):
        found = max(keys[j], barred[j])
        if found < lowest:
            lowest, at = found, whole
        if found == lowest:
            until = high
    return lowest, at, until


@jit
def evict_many(
    bits: Bits,
    least: int,
    barred: Ints,
    low: int,
    high: int,
    surplus: int,
    row: int,
    evicted_at: Ints,
) -> int:
    """Evict the `surplus` lowest held of positions low..high-1; return 1 when the margin is 0."""
    keys, count = np.empty(max(high - low, 0), dtype=bits.dtype), 0
    for j in range(low, high):
        keys[count] = ordered(bits[j], least)
        count += barred[j] < 0
    last = np.partition(keys[:count], surplus - 1)[surplus - 1]
    equal = surplus - (keys[:count] < last).sum()  # of those equal to the last, the oldest go
    tie = 0
    for j in range(low, high):
        key = ordered(bits[j], least)
        if barred[j] < 0 and key <= last:
            if key == last and equal == 0:
                tie = 1
                continue
            equal -= key == last
            barred[j] = BARRED
            evicted_at[j] = row
    return tie
