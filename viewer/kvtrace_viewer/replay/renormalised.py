"""Attention accumulated as a real run sees it: over what was kept, and cut by that; compiled.

What a row's kept part sums to hangs on every cut before it, but by few tokens in a block. So the
sums are taken over what is held at the block's start, for all rows and budgets at once, and what
went in between is taken off: in float64, where little enough is lost. Accumulated attention only
grows: a cut looks at the tokens that were lowest at the block's start (`cutting`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cutting import evict_many, leave_window
from kvtrace_viewer.replay.jit import jit, jit_sum
from kvtrace_viewer.replay.products import DOUBLES, product
from kvtrace_viewer.replay.shortlist import SPARE, drop, list_held, pick, range_of_cuts, shorten

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

TILE = 1024  # keys whose sums and marks of some budgets stay in a core's caches
DEPTH = 32  # rows that are read side by side
EIGHT = 8
eight_by_two, one_by_eight = product(EIGHT, 2), product(1, EIGHT)
LEAST = -(2**63)
RUINED = 1e-3  # of a mass: with less of it left, a difference is not good to 1e-12 for certain


@jit
def accumulate_and_cut(
    attention: Floats,
    sink_share: Doubles,
    start: int,
    state: Doubles,
    cut_rows: Longs,
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
) -> None:
    """Row by row: it joins, its kept part is renormalised and added to `state`, then the cut.

    `state` is [budget, token], the others as in `cutting.cut_lowest`.
    """
    group, rows, stop = attention.shape
    masses = kept_masses(attention, barred)
    for b in range(counts.shape[0]):
        counts[b] += start - joined
        _one_budget(
            attention,
            sink_share,
            start,
            state[b],
            masses[b],
            cut_rows,
            limits[:, b],
            sinks[:, b],
            recent[:, b],
            window,
            barred[b],
            counts[b : b + 1],
            left[b : b + 1],
            evicted_at[b],
            ties[b : b + 1],
        )
    add_shares(attention.reshape(group * rows, stop), masses, state)


@jit
def _one_budget(
    attention: Floats,
    sink_share: Doubles,
    start: int,
    sums: Doubles,
    masses: Doubles,
    cut_rows: Longs,
    limits: Longs,
    sinks: Longs,
    recent: Longs,
    window: int,
    barred: Ints,
    count: Longs,
    left: Longs,
    evicted_at: Ints,
    ties: Longs,
) -> None:
    """Turn one budget's masses [query head * row] into the shares that are yet to be added."""
    group, rows, stop = attention.shape
    lost, losses, many = np.empty(rows, np.int64), 0, False
    places, values = np.empty(stop, np.int64), np.empty(stop)
    listed, certain, spare, added, c = 0, np.inf, SPARE, 0, 0
    for r in range(rows):
        row = start + r
        for g in range(group):
            mass = _mass_left(attention[g, r], masses[g * rows + r], lost[:losses], barred, many)
            share = 1.0 / (mass + sink_share[g, r]) if mass > 0 else 0.0
            masses[g * rows + r] = share
            _add_listed(attention[g, r], share, places[:listed], values)
        count[0] += 1
        if window > 0:
            leave_window(barred, count, left, 0, row + 1 - window)
        if c == len(cut_rows) or cut_rows[c] != row:
            continue
        surplus = count[0] - limits[c]
        if surplus > 0:
            low, high = max(sinks[c], left[0]), row + 1 - recent[c]
            count[0] -= surplus
            at, tie = pick(values, places, listed, low, high)
            if surplus > 1 or at < 0 or values[at] > certain:
                _catch_up(attention, masses, added, r + 1, sums)
                added, listed = r + 1, 0
            if surplus > 1:
                bits = sums.view(np.int64)
                ties[0] += evict_many(bits, LEAST, barred, low, high, surplus, row, evicted_at)
                many = True
            else:
                if not listed:
                    lowest, highest = range_of_cuts(cut_rows[c:], sinks[c:], recent[c:], left[0])
                    listed = list_held(barred, lowest, highest, places)
                    wanted = len(cut_rows) - c + spare
                    listed, certain = shorten(sums, places, listed, wanted, values)
                    spare *= 2
                    for k in range(listed):
                        values[k] = sums[places[k]]
                    at, tie = pick(values, places, listed, low, high)
                ties[0] += tie
                lost[losses] = places[at]
                losses += 1
                barred[places[at]] = ~barred[places[at]]
                evicted_at[places[at]] = row
                listed = drop(places, values, listed, places[at])
        c += 1
    for g in range(group):
        masses[g * rows : g * rows + added] = 0


@jit
def _mass_left(row: Floats, mass: float, lost: Longs, barred: Ints, many: bool) -> float:
    """Attention on what is held, of that on what was held at the block's start."""
    left = mass
    for j in lost:
        left -= row[j]
    return left if left > RUINED * mass and not many else _mass_held(row, barred)


@jit_sum
def _mass_held(row: Floats, barred: Ints) -> float:
    total = 0.0
    for j in range(row.shape[0]):
        total += row[j] if barred[j] < 0 else 0.0
    return total


@jit
def _add_listed(row: Floats, share: float, places: Longs, values: Doubles) -> None:
    for k in range(places.shape[0]):
        values[k] += row[places[k]] * share


@jit
def _catch_up(attention: Floats, shares: Doubles, first: int, last: int, sums: Doubles) -> None:
    """Add rows first..last-1 of a block to one budget's sums."""
    group, rows, stop = attention.shape
    for r in range(first, last):
        for g in range(group):
            _add_row(attention[g, r], shares[g * rows + r], sums[:stop])


@jit_sum
def _add_row(row: Floats, share: float, sums: Doubles) -> None:
    for j in range(row.shape[0]):
        sums[j] += np.float64(row[j]) * share


@jit
def kept_masses(attention: Floats, barred: Ints) -> Doubles:
    """Return [budget, query head * row]: the attention of each row on what is not barred."""
    group, rows, stop = attention.shape
    lines = attention.reshape(group * rows, stop)
    budgets = barred.shape[0]
    held = np.zeros((-(-budgets // 2) * 2, TILE))
    masses = np.zeros((held.shape[0], lines.shape[0]))
    for first in range(0, stop, TILE):
        last = min(first + TILE, stop)
        for b in range(budgets):
            for j in range(first, last):
                held[b, j - first] = 1.0 if barred[b, j] < 0 else 0.0
        for i in range(0, lines.shape[0], 4):
            at = [min(i + k, lines.shape[0] - 1) for k in range(4)]
            for b in range(0, held.shape[0], 2):
                sums = _four_by_two(
                    lines[at[0], first:last],
                    lines[at[1], first:last],
                    lines[at[2], first:last],
                    lines[at[3], first:last],
                    held[b, : last - first],
                    held[b + 1, : last - first],
                )
                for k in range(min(4, lines.shape[0] - i)):
                    masses[b, i + k] += sums[2 * k]
                    masses[b + 1, i + k] += sums[2 * k + 1]
    return masses[:budgets]


@jit_sum
def _four_by_two(
    row0: Floats, row1: Floats, row2: Floats, row3: Floats, held0: Doubles, held1: Doubles
) -> tuple[float, float, float, float, float, float, float, float]:
    """Four rows with two budgets: each number is read once for several products."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = 0.0
    for j in range(row0.shape[0]):
        h0, h1 = held0[j], held1[j]
        a, b, c, d = (
            np.float64(row0[j]),
            np.float64(row1[j]),
            np.float64(row2[j]),
            np.float64(row3[j]),
        )
        a0 += a * h0
        a1 += a * h1
        b0 += b * h0
        b1 += b * h1
        c0 += c * h0
        c1 += c * h1
        d0 += d * h0
        d1 += d * h1
    return a0, a1, b0, b1, c0, c1, d0, d1


@jit
def add_shares(lines: Floats, shares: Doubles, state: Doubles) -> None:
    """Add lines [query head * row, key] times their shares [budget, ...] to state [budget, key]."""
    count, stop = lines.shape
    budgets = state.shape[0]
    whole = stop // (EIGHT * DOUBLES) * EIGHT
    shape, strides = (whole, count, DOUBLES), (DOUBLES * 4, stop * 4, 4)
    panels = np.lib.stride_tricks.as_strided(lines, shape, strides)
    sums = np.empty((EIGHT, EIGHT * DOUBLES))
    for first in range(0, whole, TILE // DOUBLES):
        last = min(first + TILE // DOUBLES, whole)
        for i in range(0, count, DEPTH):
            until = min(i + DEPTH, count)
            b = 0
            while b < budgets:
                together, step = (EIGHT, 2) if b + EIGHT <= budgets else (1, EIGHT)
                part = shares[b : b + together, i:until]
                for p in range(first, last, step):
                    if together == EIGHT:
                        eight_by_two(part, panels[p : p + 2, i:until], sums)
                    else:
                        one_by_eight(part, panels[p : p + EIGHT, i:until], sums)
                    for k in range(together):
                        line = state[b + k, p * DOUBLES : (p + step) * DOUBLES]
                        for j in range(line.shape[0]):
                            line[j] += sums[k, j]
                b += together
    for b in range(budgets):
        for i in range(count):
            _add_row(lines[i, whole * DOUBLES :], shares[b, i], state[b, whole * DOUBLES : stop])
