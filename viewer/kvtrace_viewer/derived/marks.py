"""Sinks and heavy hitters of a head, by the definitions of docs/policies.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.derived.pooling import MAX_BLOCK_WEIGHTS, WeightSource

SINK_WINDOW = 64
SINK_SHARE = 0.1
HEAVY_FACTOR = 5.0


@dataclass(frozen=True)
class Mark:
    """A key that stands out in one head.

    Attributes
    ----------
    kind
        "sink" or "heavy".
    position
        Of the key, in its request.
    strength
        A sink's mean attention over later queries; a heavy hitter's received attention over the
        uniform expectation.
    """

    kind: str
    position: int
    strength: float


def find_marks(source: WeightSource) -> list[Mark]:
    """Find the sinks and heavy hitters of a head, strongest first in each kind.

    The map is read a block of rows at a time and only sums per key are kept.
    """
    received, late = _sums(source)
    num_tokens = source.num_tokens
    positions = np.arange(num_tokens)
    num_late = np.maximum(0, num_tokens - 1 - SINK_WINDOW - positions)
    late_mean = np.divide(late, num_late, out=np.zeros(num_tokens), where=num_late > 0)
    is_sink = late_mean >= SINK_SHARE
    # Query i spreads 1 / (i + 1) on each key it sees, were it uniform.
    uniform = np.cumsum(1 / (positions[::-1] + 1.0))[::-1]
    ratio = received / uniform
    is_heavy = (ratio >= HEAVY_FACTOR) & ~is_sink & (num_late > 0)
    sinks = [Mark("sink", int(j), float(late_mean[j])) for j in np.flatnonzero(is_sink)]
    heavy = [Mark("heavy", int(j), float(ratio[j])) for j in np.flatnonzero(is_heavy)]
    return _strongest_first(sinks) + _strongest_first(heavy)


def _strongest_first(marks: list[Mark]) -> list[Mark]:
    return sorted(marks, key=lambda mark: -mark.strength)


def _sums(source: WeightSource) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention each key received from all queries, and from those over a window later."""
    num_tokens = source.num_tokens
    received, late = np.zeros(num_tokens), np.zeros(num_tokens)
    step = max(1, min(SINK_WINDOW, MAX_BLOCK_WEIGHTS // max(1, num_tokens)))
    for start in range(0, num_tokens, step):
        rows = np.arange(start, min(start + step, num_tokens), dtype=np.int64)
        stop = source.visible_stop(int(rows[-1]))
        block = np.nan_to_num(source.block(rows, 0, stop)).astype(np.float64)
        received[:stop] += block.sum(axis=0)
        is_late = rows[:, None] - np.arange(stop)[None, :] > SINK_WINDOW
        late[:stop] += np.where(is_late, block, 0).sum(axis=0)
    return received, late
