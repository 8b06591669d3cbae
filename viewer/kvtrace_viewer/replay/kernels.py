"""The inner loops of the replay, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit, jit_sum
from kvtrace_viewer.replay.products import LANES, product
from kvtrace_viewer.replay.vectors import COMPARED, between, lowest_bit

NEVER = np.int32(2**31 - 1)  # evicted_at of a token still held at the end, inside the engine

SPAN = 256  # keys whose attention and marks stay in the first cache

PANEL = LANES
"""Pairs in one product."""

MASS_ROWS = 16
"""Rows in one product: what is evicted inside them is added back one by one."""

FEW, PANELS = 4, 5  # rows and panels whose sums fill a processor's registers
product_of_few, product_of_one = product(FEW, PANELS), product(1, PANELS)
panel_of_many, panel_of_one = product(MASS_ROWS, 1), product(1, 1)

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
        for g in range(1, group, 2):  # two in a pass: sums are read and written half as often
            row, after = attention[g, r], attention[min(g + 1, group - 1), r]
            last = g + 1 == group
            for j in range(stop):
                target[j] = (target[j] + row[j]) + (np.float32(0) if last else after[j])


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
def told(line: Ints, at: int, first: int, last: int) -> np.uint64:
    """A bit for each of the 64 tokens from `at` on that went after rows first..last."""
    if at + COMPARED <= line.shape[0]:
        return between(line, at, first, last)
    places = np.uint64(0)
    for j in range(at, line.shape[0]):
        places |= np.uint64(first <= line[j] <= last) << np.uint64(j - at)
    return places


@jit
def list_events(evicted_at: Ints, first: int, last: int, pairs: Ints, keys: Ints) -> int:
    """Write what went after rows first..last, pair by pair; return how many."""
    count = 0
    for p in range(evicted_at.shape[0]):
        for at in range(0, evicted_at.shape[1], COMPARED):
            places = told(evicted_at[p], at, first, last)
            while places != np.uint64(0):
                pairs[count] = p
                keys[count] = at + lowest_bit(places)
                count += 1
                places &= places - np.uint64(1)
    return count


@jit
def sort_events(
    evicted_at: Ints, pairs: Ints, keys: Ints, first: int, starts: Longs, by_row: Ints
) -> None:
    """Write by_row [pair or key, event], row by row, and where each row's events begin."""
    starts[:] = 0
    for e in range(pairs.shape[0]):
        starts[evicted_at[pairs[e], keys[e]] - first + 1] += 1
    for r in range(1, starts.shape[0]):
        starts[r] += starts[r - 1]
    places = starts.copy()
    for e in range(pairs.shape[0]):
        row = evicted_at[pairs[e], keys[e]] - first
        by_row[0, places[row]] = pairs[e]
        by_row[1, places[row]] = keys[e]
        places[row] += 1


@jit
def masses_of(attention: Floats, held: Floats, active: Flags, mass: Floats) -> None:
    """Write mass [query head, row, pair]: attention [query head, row, key] times what is held.

    `held` is [panel, token, pair of the panel]; panels that are not `active` are left alone.
    A stretch of keys stays in the first cache for all of them.
    """
    group, _, stop = attention.shape
    mass[:] = 0
    sums = np.empty((MASS_ROWS, PANELS * PANEL), dtype=np.float32)
    for begin in range(0, stop, SPAN):
        end = min(begin + SPAN, stop)
        for g in range(group):
            lines, target = attention[g, :, begin:end], mass[g]
            p = 0
            while p < active.shape[0]:
                together = PANELS if active[p : p + PANELS].sum() == PANELS else 1
                if active[p]:
                    factors = held[p : p + together, begin:end]
                    columns = slice(p * PANEL, (p + together) * PANEL)
                    _add_products(lines, factors, sums, target[:, columns])
                p += together


@jit
def _add_products(lines: Floats, factors: Floats, sums: Floats, target: Floats) -> None:
    """Add to target [row, pair] the product of lines [row, key] and factors of one or PANELS."""
    rows, panels = lines.shape[0], factors.shape[0]
    if panels == PANELS:
        whole = rows // FEW * FEW
        for r in range(0, whole, FEW):
            product_of_few(lines[r : r + FEW], factors, sums[r : r + FEW])
        for r in range(whole, rows):
            product_of_one(lines[r : r + 1], factors, sums[r : r + 1])
    elif rows == MASS_ROWS:
        panel_of_many(lines, factors, sums)
    else:
        for r in range(rows):
            panel_of_one(lines[r : r + 1], factors, sums[r : r + 1])
    for r in range(rows):
        for k in range(panels * PANEL):
            target[r, k] += sums[r, k]


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


@jit_sum
def measure_read(
    attention: Floats,
    read: Flags,
    rows: Longs,
    start: int,
    limits: Floats,
    mass: Floats,
    hits: Longs,
    misses: Longs,
) -> None:
    """Write mass [query head, row], hits and misses [row] of one pair at some rows of a block.

    `read` [row, key] says what their queries read, `limits` [row] what attention is needed.
    """
    for i in range(rows.shape[0]):
        row = rows[i]
        line, hit, needed = read[i, : row + 1], 0, 0
        for g in range(attention.shape[0]):
            shown, total = attention[g, row - start, : row + 1], 0.0
            for j in range(line.shape[0]):
                total += float(shown[j]) if line[j] else 0.0
                needed += shown[j] >= limits[i]
                hit += (shown[j] >= limits[i]) & line[j]
            mass[g, row] = total
        hits[row], misses[row] = hit, needed - hit


@jit
def total_masses(
    mass: Floats,
    steps: int,
    counts: Longs,
    sums: Doubles,
    worst: Doubles,
    masses: Longs,
    least: Doubles,
    histogram: Ints,
) -> None:
    """Total mass [pair, query head, row], NaN where not measured, per row and per pair.

    `counts`, `sums` and `worst` are [pair, row], `masses` and `least` the count and the least
    [pair]; `histogram` [pair, steps + 1] counts the nearest multiples of 1 / steps.
    """
    for p in range(mass.shape[0]):
        for g in range(mass.shape[1]):
            for i in range(mass.shape[2]):
                m = np.float64(mass[p, g, i])
                if m == m:  # not NaN
                    counts[p, i] += 1
                    sums[p, i] += m
                    worst[p, i] = min(worst[p, i], m)
                    masses[p] += 1
                    least[p] = min(least[p], m)
                    histogram[p, min(round(m * steps), steps)] += 1


@jit
def has_nan(values: Floats | Doubles) -> bool:
    """Whether one of many numbers is none."""
    found = 0
    for j in range(values.shape[0]):
        found += values[j] != values[j]
    return found > 0
