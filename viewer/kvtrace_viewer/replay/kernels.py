"""The inner loops of the replay, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

NEVER = np.int32(2**31 - 1)  # evicted_at of a token still held at the end, inside the engine

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@jit
def count_needed(attention: Floats, start: int, share: float, starts: Longs) -> None:
    """Write how many keys (row, query head) needs to starts[1 + row * group + query head]."""
    group, rows, _ = attention.shape
    for r in range(rows):
        limit = share / (start + r + 1)
        for g in range(group):
            row = attention[g, r]
            found = 0
            for j in range(start + r + 1):
                found += row[j] >= limit
            starts[1 + r * group + g] = found


@jit
def fill_needed(attention: Floats, start: int, share: float, starts: Longs, keys: Ints) -> None:
    """Write the needed keys, ascending, at their `starts`; `keys` has one place to spare."""
    group, rows, _ = attention.shape
    for r in range(rows):
        limit = share / (start + r + 1)
        for g in range(group):
            row = attention[g, r]
            at = starts[r * group + g]
            for j in range(start + r + 1):
                # Written always, kept when needed: a branch here costs as much as the softmax.
                keys[at] = j
                at += row[j] >= limit


@jit
def count_hits(
    starts: Longs, keys: Ints, group: int, start: int, evicted_at: Ints, hits: Ints
) -> None:
    """Add to hits [row, pair] the needed keys a pair still holds at that row.

    Counted in int32, as wide as `evicted_at`: the loop over pairs is then vectorised.
    """
    rows, pairs = hits.shape
    for r in range(rows):
        query = np.int32(start + r)
        for at in range(starts[r * group], starts[(r + 1) * group]):
            gone = evicted_at[keys[at]]
            for p in range(pairs):
                hits[r, p] += np.int32(gone[p] >= query)


@jit
def held_at_end(evicted_at: Ints, start: int, stop: int, held: Floats) -> int:
    """Write held [panel, key, pair] for the block's last row; return evictions inside the block."""
    inside = 0
    width = held.shape[2]
    for j in range(stop):
        for p in range(evicted_at.shape[1]):
            gone = evicted_at[j, p]
            held[p // width, j, p % width] = gone >= stop - 1
            inside += (gone >= start) & (gone < stop - 1)
    return inside


@jit
def keep_held(attention: Floats, start: int, rows: Longs, evicted_at: Ints, kept: Floats) -> None:
    """Write kept [query head, row, key]: some rows of a block where held, zero elsewhere.

    `evicted_at` is [key], of one pair; `rows` index into the block.
    """
    for g in range(attention.shape[0]):
        for r in range(rows.shape[0]):
            query = start + rows[r]
            source = attention[g, rows[r]]
            target = kept[g, r]
            for j in range(source.shape[0]):
                target[j] = source[j] if evicted_at[j] >= query else np.float32(0)


@jit
def add_back(attention: Floats, start: int, evicted_at: Ints, mass: Floats) -> None:
    """Add to mass [query head, row, pair] the tokens evicted inside the block, while held.

    Added, never subtracted: taking evicted attention off the full row ruins small masses.
    """
    group, _, stop = attention.shape
    for j in range(stop):
        for p in range(evicted_at.shape[1]):
            gone = evicted_at[j, p]
            if gone >= start and gone < stop - 1:
                for g in range(group):
                    for r in range(max(0, j - start), gone - start + 1):
                        mass[g, r, p] += attention[g, r, j]


@jit
def add_far(attention: Floats, start: int, distance: int, far: Doubles) -> None:
    """Add to far [query head, key] the attention of queries more than `distance` later."""
    group, rows, _ = attention.shape
    for g in range(group):
        for r in range(rows):
            row = attention[g, r]
            for j in range(start + r - distance):
                far[g, j] += row[j]


@jit
def cut_lowest(
    scores: Doubles,
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    recent: Longs,
    window: int,
    joined: int,
    slots: Ints,
    counts: Longs,
    evicted_at: Ints,
    ties: Longs,
) -> None:
    """Cut every budget's cache at every decision row of a block, lowest scores first.

    Equal scores evict the older token. Protected tokens (position < sinks, or among the last
    `recent` positions) are never candidates; sinks + recent <= limit is the caller's promise.

    Parameters
    ----------
    scores : float64 [1 or budget, cut, key]
    rows : int64 [cut]; limits, sinks, recent : int64 [cut, budget]
    window : keys the model itself can see, 0 for all
    joined : tokens in `slots` so far (positions 0..joined-1 have been in)
    slots : int32 [budget, token], held positions ascending; counts : int64 [budget]
    evicted_at : int32 [budget, token]; ties : int64 [budget]; the last four are updated.
    """
    gathered = np.empty(slots.shape[1], dtype=np.float64)
    for b in range(counts.shape[0]):
        count = counts[b]
        last = joined
        for c in range(rows.shape[0]):
            for j in range(last, rows[c] + 1):
                slots[b, count] = j
                count += 1
            last = rows[c] + 1
            line = scores[b if scores.shape[0] > 1 else 0, c]
            count, tie = cut_row(
                line,
                rows[c],
                limits[c, b],
                sinks[c, b],
                recent[c, b],
                window,
                slots[b],
                count,
                evicted_at[b],
                gathered,
            )
            ties[b] += tie
        counts[b] = count


@jit
def cut_oldest(
    rows: Longs,
    limits: Longs,
    sinks: Longs,
    window: int,
    joined: int,
    slots: Ints,
    counts: Longs,
    evicted_at: Ints,
) -> None:
    """Cut as `cut_lowest` does where the score is the position, without looking for it."""
    for b in range(counts.shape[0]):
        mine = slots[b]
        count = counts[b]
        last = joined
        for c in range(rows.shape[0]):
            for j in range(last, rows[c] + 1):
                mine[count] = j
                count += 1
            last = rows[c] + 1
            if window > 0:
                count = _leave_window(mine, count, last - window)
            surplus = count - limits[c, b]
            if surplus > 0:
                low = _first_from(mine, count, sinks[c, b])
                for s in range(low, low + surplus):
                    evicted_at[b, mine[s]] = rows[c]
                for s in range(low + surplus, count):
                    mine[s - surplus] = mine[s]
                count -= surplus
        counts[b] = count


@jit
def cut_row(
    line: Doubles,
    row: int,
    limit: int,
    sinks: int,
    recent: int,
    window: int,
    mine: Ints,
    count: int,
    evicted_at: Ints,
    gathered: Doubles,
) -> tuple[int, int]:
    """Cut one cache (slots `mine`, `count` held) after `row`; return (held, 1 if the margin is 0).

    `line` [key] are the scores, `gathered` [token] is working space.
    """
    if window > 0:
        count = _leave_window(mine, count, row + 1 - window)
    surplus = count - limit
    if surplus <= 0:
        return count, 0
    low = _first_from(mine, count, sinks)
    high = _first_from(mine, count, row + 1 - recent)
    if surplus == 1:
        tie = _evict_one(mine, count, low, high, line, row, evicted_at)
    else:
        tie = _evict_many(mine, count, low, high, surplus, line, row, evicted_at, gathered)
    return count - surplus, tie


@jit
def _first_from(mine: Ints, count: int, position: int) -> int:
    """Return the first slot at or after `position`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if mine[middle] < position:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _leave_window(mine: Ints, count: int, oldest_gone: int) -> int:
    """Drop positions <= oldest_gone, which the model itself can no longer see."""
    gone = 0
    while gone < count and mine[gone] <= oldest_gone:
        gone += 1
    if gone:
        for s in range(gone, count):
            mine[s - gone] = mine[s]
    return count - gone


@jit
def _evict_one(
    mine: Ints, count: int, low: int, high: int, line: Doubles, row: int, evicted_at: Ints
) -> int:
    """Evict the lowest of slots low..high-1; return 1 when another is equally low."""
    best = low
    least = line[mine[low]]
    again = 0
    for s in range(low + 1, high):
        score = line[mine[s]]
        if score < least:
            least = score
            best = s
            again = 0
        elif score == least:
            again = 1
    evicted_at[mine[best]] = row
    for s in range(best + 1, count):
        mine[s - 1] = mine[s]
    return again


@jit
def _evict_many(
    mine: Ints,
    count: int,
    low: int,
    high: int,
    surplus: int,
    line: Doubles,
    row: int,
    evicted_at: Ints,
    gathered: Doubles,
) -> int:
    """Evict the `surplus` lowest of slots low..high-1; return 1 when the margin is 0."""
    for s in range(low, high):
        gathered[s - low] = line[mine[s]]
    # Stable, and slots ascend by position: among equals the older comes first.
    order = np.argsort(gathered[: high - low], kind="mergesort")
    tie = 0
    if surplus < high - low and gathered[order[surplus - 1]] == gathered[order[surplus]]:
        tie = 1
    for s in order[:surplus]:
        evicted_at[mine[low + s]] = row
        mine[low + s] = -1
    kept = 0
    for s in range(count):
        if mine[s] >= 0:
            mine[kept] = mine[s]
            kept += 1
    return tie
