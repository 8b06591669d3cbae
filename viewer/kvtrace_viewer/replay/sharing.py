"""One budget shared by the KV heads of a layer: each decision sees what all of them hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cache import Cache, Cuts

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

Allocate = Callable[[list[Doubles], Longs], Longs]
ScoreHeld = Callable[[int, int, int, Longs, int], Doubles]
"""(head, cut, budget, held, limit) -> scores of what is held."""


def cut_together(
    cuts: Sequence[Cuts],
    caches: Sequence[Cache],
    keys: int,
    score_held: ScoreHeld,
    allocate: Allocate,
) -> None:
    """Make a block's decisions in all heads of a layer.

    What is allocated replaces the limits in `cuts`, with the protection clipped to it.

    Parameters
    ----------
    cuts, caches : sequences by head
    keys : int
        Keys of the block.
    score_held, allocate : callable
        See `Policy.score_held` and `Policy.allocate`.
    """
    for c, row in enumerate(cuts[0].rows):
        now = [one.within(row, row + 1) for one in cuts]
        lines = np.zeros((len(cuts), now[0].limits.shape[1], 1, keys))
        for b in range(lines.shape[1]):
            held = [cache.held_before(int(row), b) for cache in caches]
            counts = np.array([len(one) for one in held])
            limits = np.array([one.limits[0, b] for one in now])
            if counts.sum() > limits.sum():
                scores = [
                    np.array(score_held(h, c, b, at, int(limits[h])), dtype=np.float64)
                    for h, at in enumerate(held)
                ]
                for line, at, score in zip(lines, held, scores, strict=True):
                    line[b, 0, at] = score
                for one, at, score in zip(now, held, scores, strict=True):
                    protected = (at < one.sinks[0, b]) | (at > row - one.recent[0, b])
                    score[protected] = np.inf
                counts = np.minimum(allocate(scores, limits), counts)
            for one, count in zip(now, counts, strict=True):
                one.allot(b, int(count))
        for one, cache, line in zip(now, caches, lines, strict=True):
            cache.cut(one, line)
