"""Whole chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.composed import BaseState, Composed
from kvtrace_viewer.replay.policy import parameter

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ChunkKV(Composed):
    """Keep whole chunks of neighbouring tokens, by the mean of another policy's scores.

    Liu et al. 2025, "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context
    LLM Inference", arXiv:2502.00299. Scores are summed over the heads of a layer, so all heads
    keep the same chunks; a chunk that does not fit into the budget is dropped whole. Deviations:
    the paper's sharing of indices between layers is left out; where not even one chunk fits, the
    youngest tokens of the best one stay.

    Signals: the base's.
    """

    name: ClassVar[str] = "chunkkv"
    shares_heads: ClassVar[bool] = True
    needs_held: ClassVar[bool] = True

    chunk: int = parameter(20, "tokens of a chunk", "tokens", 1)

    def score_held(
        self, held: Longs, limit: int, row: int, block: Block, state: BaseState
    ) -> Doubles:
        """Return the base's scores."""
        return self.base_scores(held, limit, row, block, state)

    def decide_layer(
        self,
        blocks: Sequence[Block],
        cuts: Sequence[Cuts],
        states: Sequence[Any],
        caches: Sequence[Cache],
    ) -> None:
        """Cut all heads alike."""
        score_held = self.layer_scores(blocks, cuts, states)
        for c, row in enumerate(cuts[0].rows):
            now = [one.within(row, row + 1) for one in cuts]
            lines = np.zeros((now[0].limits.shape[1], 1, row + 1))
            limits = now[0].limits.copy()
            for b, limit in enumerate(now[0].limits[0]):
                held = caches[0].held_before(int(row), b)
                if len(held) > limit:
                    scores = [score_held(h, c, b, held, int(limit)) for h in range(len(blocks))]
                    fixed = (held < now[0].sinks[0, b]) | (held > row - now[0].recent[0, b])
                    kept = self._chosen(held, np.sum(scores, axis=0), int(limit), fixed)
                    lines[b, 0, held] = kept
                    limits[0, b] = kept.sum()
            for one, cache in zip(now, caches, strict=True):
                sinks = np.minimum(one.sinks, limits)
                recent = np.minimum(one.recent, limits - sinks)
                cache.cut(replace(one, limits=limits, sinks=sinks, recent=recent), lines)

    def _chosen(
        self, held: Longs, scores: Doubles, limit: int, fixed: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """[held]: what stays; the best chunks, up to the first that does not fit."""
        _, of_token, sizes = np.unique(held // self.chunk, return_inverse=True, return_counts=True)
        means = np.bincount(of_token, scores) / sizes
        kept = fixed.copy()
        best = np.argsort(means, kind="stable")[::-1]  # of equals the younger
        for chunk in best:
            wanted = kept | (of_token == chunk)
            if wanted.sum() > limit:
                break
            kept = wanted
        if not kept.any():
            kept[np.flatnonzero(of_token == best[0])[-limit:]] = True
        return kept
