"""A budget that the heads of a layer share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.composed import BaseState, Composed
from kvtrace_viewer.replay.policy import parameter

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class AdaKV(Composed):
    """Score as another policy does, and let the heads of a layer compete for its budget.

    Feng et al. 2024, "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
    Efficient LLM Inference", arXiv:2407.11550. Each head keeps its floor(alpha * B) best; what is
    left of the layer's budget goes to the highest scores of all its heads. No deviations.

    Signals: the base's.
    """

    name: ClassVar[str] = "adakv"
    shares_heads: ClassVar[bool] = True
    needs_held: ClassVar[bool] = True

    alpha: float = parameter(0.2, "share of the budget that a head keeps in any case", "share", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise InputError(f"alpha of adakv is {self.alpha}; expected 0 to 1; write alpha=0.2")

    def score_held(
        self, held: Longs, limit: int, row: int, block: Block, state: BaseState
    ) -> Doubles:
        """Return the base's scores."""
        return self.base_scores(held, limit, row, block, state)

    def allocate(self, scores: list[Doubles], limits: Longs) -> Longs:
        """Count how many of the best each head has."""
        return compete(scores, limits, self.alpha)


def compete(scores: list[Doubles], limits: Longs, alpha: float) -> Longs:
    """Divide a layer's budget by the scores: see `Policy.allocate`.

    Equal scores leave the slot to the later head, or the younger token.
    """
    safe = (np.asarray(limits) * alpha).astype(np.int64)
    lines = []
    for line, count in zip(scores, safe, strict=True):
        order = np.argsort(line, kind="stable")
        kept = line.copy()
        kept[order[len(order) - min(count, len(order)) :]] = np.inf
        lines.append(kept)
    heads = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    best = np.argsort(np.concatenate(lines), kind="stable")[-int(np.sum(limits)) :]
    return np.bincount(heads[best], minlength=len(lines))
