"""The few tokens that a block's cuts may evict, of thousands; compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.jit import jit, jit_least

Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

SPARE = 32  # tokens listed beyond those that will go


@jit
def range_of_cuts(rows: Longs, sinks: Longs, recent: Longs, left: int) -> tuple[int, int]:
    """First position that some cut may evict, and one past the last."""
    lowest, highest = max(sinks[0], left), 0
    for c in range(rows.shape[0]):
        lowest = min(lowest, max(sinks[c], left))
        highest = max(highest, rows[c] + 1 - recent[c])
    return lowest, highest


@jit
def list_held(barred: Ints, low: int, high: int, places: Longs) -> int:
    """Write the positions low..high-1 that are held, ascending; return their number."""
    count = 0
    for j in range(low, high):
        places[count] = j  # written always, kept when held: a branch here costs as much again
        count += barred[j] < 0
    return count


@jit
def shorten(
    least: Doubles, places: Longs, listed: int, wanted: int, values: Doubles
) -> tuple[int, float]:
    """Leave in a list the `wanted` positions of least `least`, and those equal to the last.

    Returns their number, and what the values of all others are above.
    """
    if listed <= wanted + SPARE:
        return listed, np.inf
    gather(least, places, listed, values)
    certain = np.partition(values[:listed], wanted)[wanted]
    count = 0
    for k in range(listed):
        places[count] = places[k]
        count += values[k] <= certain
    return count, certain


@jit
def gather(line: Doubles, places: Longs, listed: int, values: Doubles) -> None:
    """Write line[places] to values."""
    for k in range(listed):
        values[k] = line[places[k]]


@jit
def pick(values: Doubles, places: Longs, listed: int, low: int, high: int) -> tuple[int, int]:
    """Return which of a list is lowest among positions low..high-1 (-1: none), and 1 on a tie."""
    first, last = 0, listed
    while first < last and places[first] < low:
        first += 1
    while last > first and places[last - 1] >= high:
        last -= 1
    if first == last:
        return -1, 0
    among = values[first:last]
    lowest = _least(among)
    found = first
    while values[found] != lowest:
        found += 1
    return found, int(_count(among, lowest) > 1)


@jit
def drop(places: Longs, values: Doubles, listed: int, place: int) -> int:
    """Take a position out of a list, if it is there; return how many are left."""
    count = 0
    for k in range(listed):
        places[count] = places[k]
        values[count] = values[k]
        count += places[k] != place
    return count


@jit_least
def _least(values: Doubles) -> float:
    lowest: float = values[0]
    for k in range(values.shape[0]):
        lowest = min(lowest, values[k])
    return lowest


@jit
def _count(values: Doubles, value: float) -> int:
    found = 0
    for k in range(values.shape[0]):
        found += values[k] == value
    return found
