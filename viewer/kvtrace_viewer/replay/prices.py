"""What tokens are worth at a price of their slots, from the last row to the first; compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]
Four = tuple[Doubles, Doubles, Doubles, Doubles]

TILE = 1024  # keys whose values at a price stay in a core's first cache for all rows of a block


@jit
def sweep(
    received: Doubles,
    start: int,
    prices: Doubles,
    is_cut: NDArray[np.bool_],
    last_cut: Longs,
    first_cut: int,
    values: Doubles,
    worth: Doubles,
    out: Doubles,
) -> None:
    """Carry `values` [price, key] from a block's last row to its first, as `oracle` defines them.

    Four rows at once where nothing changes between them: values stay in a processor's registers.

    `out` [price, cut, key] gets the values at each cut unless it has no cuts; to `worth` [price]
    is added what tokens are worth when they join.
    """
    rows, stop = received.shape
    for first in range(0, stop, TILE):
        last = min(first + TILE, stop)
        for k in range(prices.shape[0]):
            line = values[k, first:last]
            c = out.shape[1]
            r = rows - 1
            while r >= max(first - start, 0):
                if _alike(r, start, last, is_cut, last_cut):
                    shown = (
                        received[r, first:last],
                        received[r - 1, first:last],
                        received[r - 2, first:last],
                        received[r - 3, first:last],
                    )
                    c -= 4 * is_cut[r]
                    if is_cut[r] and out.shape[1]:
                        told = (
                            out[k, c + 3, first:last],
                            out[k, c + 2, first:last],
                            out[k, c + 1, first:last],
                            out[k, c, first:last],
                        )
                        _pay_and_tell_four(line, shown, prices[k], start + r + 1, told)
                    else:
                        floor = 0.0 if is_cut[r] else -np.inf
                        _pay_four(line, floor, shown, prices[k], start + r + 1)
                    r -= 4
                    continue
                row = start + r
                joined = min(row + 1, last) - first
                floor = 0.0 if is_cut[r] else -np.inf
                c -= is_cut[r]
                if is_cut[r] and out.shape[1]:
                    _raise(line[:joined], floor, out[k, c, first : first + joined])
                pays = min(max(last_cut[r] + 1 - first, 0), joined)
                price = prices[k] / (row + 1)
                one = received[r, first : first + joined]
                _pay(line[:pays], floor, one[:pays], price)
                if pays < joined:
                    until = min(row - first, joined)
                    _raise(line[pays:joined], floor, line[pays:joined])
                    if last_cut[r] >= 0:
                        _pay(line[pays:until], -np.inf, one[pays:until], 0.0)
                if first <= row < last and row > first_cut:
                    worth[k] += line[row - first]
                r -= 1


@jit
def _alike(r: int, start: int, last: int, is_cut: NDArray[np.bool_], last_cut: Longs) -> bool:
    """Whether rows r-3..r pay for all keys before `last`, and all or none of them are cuts."""
    if r < 3 or start + r - 3 < last:
        return False
    alike = True
    for i in range(r - 3, r + 1):
        alike &= last_cut[i] + 1 >= last and is_cut[i] == is_cut[r]
    return alike


@jit
def _pay_four(line: Doubles, floor: float, received: Four, price: float, seen: int) -> None:
    """As `_pay` row by row, the last row, which sees `seen` keys, first."""
    r0, r1, r2, r3 = received
    p0, p1, p2, p3 = price / seen, price / (seen - 1), price / (seen - 2), price / (seen - 3)
    for j in range(line.shape[0]):
        value = line[j]
        value = (value if value > floor else floor) + (r0[j] - p0)
        value = (value if value > floor else floor) + (r1[j] - p1)
        value = (value if value > floor else floor) + (r2[j] - p2)
        line[j] = (value if value > floor else floor) + (r3[j] - p3)


@jit
def _pay_and_tell_four(line: Doubles, received: Four, price: float, seen: int, out: Four) -> None:
    """As `_pay_four` where all rows are cuts; `out` gets the values at each."""
    r0, r1, r2, r3 = received
    o0, o1, o2, o3 = out
    p0, p1, p2, p3 = price / seen, price / (seen - 1), price / (seen - 2), price / (seen - 3)
    for j in range(line.shape[0]):
        value = line[j]
        value = value if value > 0.0 else 0.0
        o0[j] = value
        value += r0[j] - p0
        value = value if value > 0.0 else 0.0
        o1[j] = value
        value += r1[j] - p1
        value = value if value > 0.0 else 0.0
        o2[j] = value
        value += r2[j] - p2
        value = value if value > 0.0 else 0.0
        o3[j] = value
        line[j] = value + (r3[j] - p3)


@jit
def _pay(line: Doubles, floor: float, received: Doubles, price: float) -> None:
    for j in range(line.shape[0]):
        value = line[j] if line[j] > floor else floor
        line[j] = value + (received[j] - price)


@jit
def _raise(line: Doubles, floor: float, out: Doubles) -> None:
    for j in range(line.shape[0]):
        out[j] = line[j] if line[j] > floor else floor
