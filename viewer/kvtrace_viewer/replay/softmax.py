"""From scores to attention, and to what is needed of it, compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit, jit_sum
from kvtrace_viewer.replay.products import LANES, TILE, product
from kvtrace_viewer.replay.vectors import COMPARED, lowest_bit, reaching, times_power

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

LEAST, MOST = np.float32(-80), np.float32(80)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDING = np.float32(1.5 * 2**23)  # added, it leaves the nearest integer in the lowest bits
# exp(z) = 1 + z + z^2 (C2 + C3 z + ...) for |z| <= log(2)/2, to 8e-8: Cephes' polynomial.
C2, C3, C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
C5, C6, C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
ONE = np.float32(1)

FEW, SPAN = 4, 2 * TILE  # rows and keys whose scores stay in the first cache until they are used
PANELS = TILE // LANES
product_of_few, product_of_one = product(FEW, PANELS), product(1, PANELS)


@jit_sum
def _exp(scores: Floats, total: np.float32, out: Floats) -> None:
    """Write exp(score - total).

    numpy's exp and the passes before it took three times as long. What would become less than
    e^-80 becomes 0: it is lost in any sum, and numbers too small to be normal take a processor
    many times as long wherever they are used.
    """
    for j in range(out.shape[0]):
        given = scores[j] - total
        x = given if given > LEAST else LEAST
        x = x if x < MOST else MOST  # attention is at most 1; what is not may not wrap round
        shifted = x * LOG2_E + ROUNDING
        n = shifted - ROUNDING
        z = (x - n * LN2_HIGH) - n * LN2_LOW
        p = ((((C7 * z + C6) * z + C5) * z + C4) * z + C3) * z + C2
        found = times_power(p * (z * z) + z + ONE, shifted)
        out[j] = found if given > LEAST else np.float32(0)


@jit
def exp_of_rows(scores: Floats, totals: Floats, start: int) -> None:
    """Turn scores [row, key] into exp(score - total of the row); zero after the row's own token."""
    for r in range(scores.shape[0]):
        seen = start + r + 1
        _exp(scores[r, :seen], totals[r], scores[r, :seen])
        scores[r, seen:] = 0


@jit
def attention_of_rows(
    queries: Floats,
    keys: Floats,
    totals: Floats,
    start: int,
    window: int,
    memory: Floats,
    out: Floats,
) -> None:
    """Write out [row, key]: exp(q k - total of the row), zero for keys that a row cannot see.

    A few rows and keys at a time, from product to attention in a core's first cache.

    Parameters
    ----------
    queries : [row, dim], scaled, of rows start, start + 1, ...
    keys : [panel, dim, LANES], see `products.packed`
    window : keys that a row can see, its own included
    memory : [FEW, SPAN], working space
    """
    rows, stop = out.shape
    for first in range(0, stop, SPAN):
        last = min(first + SPAN, stop)
        for r in range(0, rows, FEW):
            few = min(FEW, rows - r)
            if first < start + r + few and last > start + r + 1 - window:
                for tile in range(first // TILE, -(-last // TILE)):
                    panels = keys[tile * PANELS : (tile + 1) * PANELS]
                    scores = memory[:, tile * TILE - first : (tile + 1) * TILE - first]
                    if few == FEW:
                        product_of_few(queries[r : r + FEW], panels, scores)
                    else:
                        for i in range(few):
                            product_of_one(queries[r + i : r + i + 1], panels, scores[i : i + 1])
            for i in range(few):
                row = start + r + i
                low = min(max(row + 1 - window, first), last)
                high = max(min(row + 1, last), low)
                line = out[r + i]
                line[first:low] = 0
                _exp(memory[i, low - first : high - first], totals[r + i], line[low:high])
                line[high:last] = 0


@jit
def find_needed(attention: Floats, start: int, limits: Floats, starts: Longs, keys: Ints) -> None:
    """Write the needed keys, ascending, row by row, and where each (row, query head) begins.

    Needed is what is at least the row's limit. `starts` [row * group + query head + 1]; `keys`
    has a place for every key of every row.
    """
    group, rows, _ = attention.shape
    at = 0
    for r in range(rows):
        limit = limits[r]
        for g in range(group):
            starts[r * group + g] = at
            row = attention[g, r, : start + r + 1]
            whole = row.shape[0] // COMPARED * COMPARED
            for first in range(0, whole, COMPARED):
                found = reaching(row, first, limit)
                while found != np.uint64(0):
                    keys[at] = first + lowest_bit(found)
                    at += 1
                    found &= found - np.uint64(1)
            for j in range(whole, row.shape[0]):
                keys[at] = j
                at += row[j] >= limit
    starts[rows * group] = at


def least_float(limits: NDArray[np.float64]) -> Floats:
    """Return the least float32 that is at least each limit: comparing to either is the same."""
    near = limits.astype(np.float32)
    return np.where(near < limits, np.nextafter(near, np.float32(np.inf)), near)
