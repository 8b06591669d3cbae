"""Sinks and heavy hitters of a head, by the definitions of docs/policies.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.head_map import HeadMap
from kvtrace.head_sums import KeySums, Sums, head_sums

# The replay's own thresholds (kvtrace_viewer.replay.Measures), so that both name the same keys.
SINK_DISTANCE = 64
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


def find_marks(head: HeadMap) -> list[Mark]:
    """Find the sinks and heavy hitters of a head, strongest first in each kind.

    The distance is a quarter of a request shorter than four times 64 tokens. The map is read a
    block of rows at a time and only sums per key are kept.
    """
    return marks_of(head_sums(head, sink_distance(head.num_tokens)).keys)


def sink_distance(num_tokens: int) -> int:
    """How many tokens later a query has to be to count for a sink, in a request of this length."""
    return min(SINK_DISTANCE, num_tokens // 4)


def marks_of(sums: KeySums) -> list[Mark]:
    """The same as `find_marks`, where the sums are there already."""
    seen_from_far = sums.far_queries > 0
    share = np.divide(sums.far, sums.far_queries, out=np.zeros_like(sums.far), where=seen_from_far)
    ratio = np.divide(
        sums.received, sums.uniform, out=np.zeros_like(sums.far), where=sums.uniform > 0
    )
    is_sink = (share >= SINK_SHARE) & sums.seen_at_end
    is_heavy = (ratio >= HEAVY_FACTOR) & ~is_sink
    return _strongest("sink", is_sink, share) + _strongest("heavy", is_heavy, ratio)


def _strongest(kind: str, chosen: NDArray[np.bool_], strength: Sums) -> list[Mark]:
    positions = np.flatnonzero(chosen)
    order = positions[np.argsort(-strength[positions], kind="stable")]
    return [Mark(kind, int(position), float(strength[position])) for position in order]
