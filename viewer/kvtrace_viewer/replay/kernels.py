"""The inner loops of the replay, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

NEVER = np.int32(2**31 - 1)  # evicted_at of a token still held at the end, inside the engine

CHUNK = 128  # keys that are looked at together

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


@jit
def sum_group(attention: Floats, received: Doubles) -> None:
    """Write received [row, key], the sum over the query heads, each in the same order."""
    group, rows, stop = attention.shape
    for r in range(rows):
        target = received[r]
        target[:] = attention[0, r]
        for g in range(1, group):
            row = attention[g, r]
            for j in range(stop):
                target[j] += row[j]


@jit
def add_far(attention: Floats, start: int, distance: int, far: Doubles) -> None:
    """Add to far [query head, key] the attention of queries more than `distance` later.

    A block's rows are summed in float32, the blocks in float64.
    """
    group, rows, stop = attention.shape
    sums = np.empty(stop, dtype=np.float32)
    for g in range(group):
        sums[:] = 0
        for r in range(rows):
            row = attention[g, r]
            for j in range(start + r - distance):
                sums[j] += row[j]
        for j in range(stop):
            far[g, j] += sums[j]


@jit
def count_events(evicted_at: Ints, stop: int, first: int, starts: Longs) -> None:
    """Write to starts [row + 2] how many of keys 0..stop-1 went after row first, first+1, ...

    Counts are summed up to where each row's events begin, one place further than `fill_events`
    needs it.
    """
    last = first + starts.shape[0] - 3
    starts[:] = 0
    for p in range(evicted_at.shape[0]):
        for begin in range(0, stop, CHUNK):
            line = evicted_at[p, begin : min(begin + CHUNK, stop)]
            if not is_told(line, first, last):
                continue
            for j in range(line.shape[0]):
                if line[j] >= first and line[j] <= last:
                    starts[line[j] - first + 2] += 1
    for r in range(2, starts.shape[0]):
        starts[r] += starts[r - 1]


@jit
def fill_events(
    evicted_at: Ints, stop: int, first: int, starts: Longs, pairs: Ints, keys: Ints
) -> None:
    """Write pair and key of each event, row by row; starts [row + 2] then begin each row."""
    last = first + starts.shape[0] - 3
    for p in range(evicted_at.shape[0]):
        for begin in range(0, stop, CHUNK):
            line = evicted_at[p, begin : min(begin + CHUNK, stop)]
            if not is_told(line, first, last):
                continue
            for j in range(line.shape[0]):
                if line[j] >= first and line[j] <= last:
                    at = starts[line[j] - first + 1]
                    starts[line[j] - first + 1] = at + 1
                    pairs[at] = p
                    keys[at] = begin + j


@jit
def is_told(line: Ints, first: int, last: int) -> bool:
    """Whether something of a line went after rows first..last: most stretches hold nothing."""
    found = 0
    for j in range(line.shape[0]):
        found += (line[j] >= first) & (line[j] <= last)
    return found > 0


@jit
def release(pairs: Ints, keys: Ints, first: int, last: int, held: Floats) -> None:
    """Apply events first..last-1 to held [panel, key, pair of the panel]."""
    width = held.shape[2]
    for e in range(first, last):
        held[pairs[e] // width, keys[e], pairs[e] % width] = 0


@jit
def add_back(
    attention: Floats,
    start: int,
    first: int,
    event_starts: Longs,
    pairs: Ints,
    keys: Ints,
    mass: Floats,
) -> None:
    """Add to mass [query head, row, pair] what was released too early for some rows from `first`.

    Events r lie between event_starts[r] and [r + 1] and happen after row first + r, which still
    saw the tokens. Added, never subtracted: taking evicted attention off the full row ruins small
    masses.
    """
    for i in range(event_starts.shape[0] - 1):
        for e in range(event_starts[i], event_starts[i + 1]):
            j, p = keys[e], pairs[e]
            for g in range(attention.shape[0]):
                for r in range(max(j, first) - start, first + i - start + 1):
                    mass[g, r, p] += attention[g, r, j]


@jit
def store_masses(
    found: Floats, active: Longs, first_rows: Longs, known: Flags, start: int, mass: Floats
) -> None:
    """Copy found [query head, row, pair] to mass [pair, query head, row] where it is measured."""
    group, rows, _ = found.shape
    for p in active:
        for g in range(group):
            for r in range(max(first_rows[p] - start, 0), rows):
                if known[r]:
                    mass[p, g, start + r] = found[g, r, p]


@jit
def count_hits(
    starts: Longs,
    keys: Ints,
    group: int,
    event_starts: Longs,
    event_pairs: Ints,
    event_keys: Ints,
    held: Words,
    hits: Ints,
) -> None:
    """Add to hits [row, pair] the needed keys a pair still holds at that row.

    `held` [key, word] has a byte per pair, so that one addition counts for eight pairs; event r
    lies between event_starts[r] and [r + 1] and is applied after row r.
    """
    sums = np.zeros(held.shape[1], dtype=np.uint64)
    counts = sums.view(np.uint8)
    marks = held.view(np.uint8)
    for r in range(hits.shape[0]):
        first, last = starts[r * group], starts[(r + 1) * group]
        while first < last:
            until = min(first + 255, last)  # a byte counts to 255
            for at in range(first, until):
                line = held[keys[at]]
                for w in range(sums.shape[0]):
                    sums[w] += line[w]
            for p in range(hits.shape[1]):
                hits[r, p] += counts[p]
            sums[:] = 0
            first = until
        for e in range(event_starts[r], event_starts[r + 1]):
            marks[event_keys[e], event_pairs[e]] = 0


@jit
def total_masses(
    mass: Floats,
    steps: int,
    counts: Longs,
    sums: Doubles,
    worst: Doubles,
    histogram: Ints,
) -> None:
    """Add mass [pair, query head, row], NaN where not measured, to what is kept per row.

    `counts`, `sums` and `worst` are [pair, row]; `histogram` [pair, steps + 1] counts the nearest
    multiples of 1 / steps.
    """
    for p in range(mass.shape[0]):
        for g in range(mass.shape[1]):
            for i in range(mass.shape[2]):
                m = np.float64(mass[p, g, i])
                if m == m:  # not NaN
                    counts[p, i] += 1
                    sums[p, i] += m
                    worst[p, i] = min(worst[p, i], m)
                    histogram[p, min(round(m * steps), steps)] += 1


@jit
def has_nan(values: Floats | Doubles) -> bool:
    """Whether one of many numbers is none."""
    found = 0
    for j in range(values.shape[0]):
        found += values[j] != values[j]
    return found > 0
