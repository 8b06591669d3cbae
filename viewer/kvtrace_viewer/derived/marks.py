"""Sinks and heavy hitters of a head, by the definitions of docs/policies.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.derived.pooling import MAX_BLOCK_WEIGHTS, WeightSource

# The replay's own thresholds (kvtrace_viewer.replay.Measures), so that both name the same keys.
SINK_DISTANCE = 64
SINK_SHARE = 0.1
HEAVY_FACTOR = 5.0
BLOCK_ROWS = 64

Sums = NDArray[np.float64]


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


@dataclass(frozen=True)
class KeySums:
    """What each key of a head received, [key].

    Attributes
    ----------
    received, uniform
        Attention from all queries that see the key, and what it would be were each uniform.
    far, far_queries
        Attention from the queries more than a distance later, and how many they are.
    """

    received: Sums
    uniform: Sums
    far: Sums
    far_queries: Sums


def find_marks(source: WeightSource) -> list[Mark]:
    """Find the sinks and heavy hitters of a head, strongest first in each kind.

    The distance is a quarter of a request shorter than four times 64 tokens. The map is read a
    block of rows at a time and only sums per key are kept.
    """
    return marks_of(source, key_sums(source, sink_distance(source)))


def sink_distance(source: WeightSource) -> int:
    """How many tokens later a query has to be to count for a sink."""
    return min(SINK_DISTANCE, source.num_tokens // 4)


def marks_of(source: WeightSource, sums: KeySums) -> list[Mark]:
    """The same as `find_marks`, where the sums are there already."""
    seen_from_far = sums.far_queries > 0
    share = np.divide(sums.far, sums.far_queries, out=np.zeros_like(sums.far), where=seen_from_far)
    ratio = np.divide(
        sums.received, sums.uniform, out=np.zeros_like(sums.far), where=sums.uniform > 0
    )
    is_sink = (share >= SINK_SHARE) & _still_seen(source)
    is_heavy = (ratio >= HEAVY_FACTOR) & ~is_sink
    return _strongest("sink", is_sink, share) + _strongest("heavy", is_heavy, ratio)


def _strongest(kind: str, chosen: NDArray[np.bool_], strength: Sums) -> list[Mark]:
    positions = np.flatnonzero(chosen)
    order = positions[np.argsort(-strength[positions], kind="stable")]
    return [Mark(kind, int(position), float(strength[position])) for position in order]


def _still_seen(source: WeightSource) -> NDArray[np.bool_]:
    """Keys that the last query sees: a sliding window has dropped the others."""
    if source.num_tokens == 0:
        return np.zeros(0, bool)
    last = np.array([source.num_tokens - 1], np.int64)
    return np.asarray(~np.isnan(source.block(last, 0, source.num_tokens)[0]))


def key_sums(source: WeightSource, distance: int) -> KeySums:
    """Sum a head's map over its queries."""
    total = source.num_tokens
    sums = KeySums(*(np.zeros(total) for _ in range(4)))
    step = max(1, min(BLOCK_ROWS, MAX_BLOCK_WEIGHTS // max(1, total)))
    for start in range(0, total, step):
        rows = np.arange(start, min(start + step, total), dtype=np.int64)
        stop = source.visible_stop(int(rows[-1]))
        block = source.block(rows, 0, stop)
        seen = ~np.isnan(block)
        weights = np.nan_to_num(block, copy=False)
        received = weights.sum(axis=0)
        sums.received[:stop] += received
        share = (1 / np.maximum(1, seen.sum(axis=1))).astype(np.float32)
        sums.uniform[:stop] += share @ seen.astype(np.float32)
        # Keys this far before the block are far from all of its queries: no mask needed.
        clear = max(0, start - distance)
        sums.far[:clear] += received[:clear]
        sums.far_queries[:clear] += seen[:, :clear].sum(axis=0)
        is_far = seen[:, clear:] & (rows[:, None] - np.arange(clear, stop) > distance)
        sums.far[clear:stop] += np.where(is_far, weights[:, clear:], 0).sum(axis=0)
        sums.far_queries[clear:stop] += is_far.sum(axis=0)
    return sums
