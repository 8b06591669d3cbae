"""Values as the output projection sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.composed import BaseState, Composed
from kvtrace_viewer.replay.policy import parameter

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

TOKENS = 1024  # values projected at a time: memory is tokens x hidden


@dataclass
class Weighted(BaseState):
    """The base's state, and `norms` [token] of the projected values."""

    norms: Doubles


def projected_norms(head: Head, order: int) -> Doubles:
    """[query head of the group, token]: L1 or L2 norm of W_o v."""
    if head.v is None or head.wo is None:
        raise ValueError("v and wo are declared; the engine checks that the trace has them")
    norms = np.empty((head.group, head.tokens))
    for start in range(0, head.tokens, TOKENS):
        some = slice(start, start + TOKENS)
        for g in range(head.group):
            projected = head.v[some].astype(np.float64) @ head.wo[g].T.astype(np.float64)
            norms[g, some] = np.linalg.norm(projected, ord=order, axis=1)
    return norms


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Composed):
    """Fill half the budget by another policy's scores, the rest by them times the value's weight.

    Feng et al. 2025, "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", arXiv:2502.03805. A value's weight is the L1 norm of W_o v, mean over the
    group's query heads; the second half ranks (score + epsilon) * weight. No deviations.

    Signals: the base's, v and wo.
    """

    name: ClassVar[str] = "criticalkv"
    signals: ClassVar[frozenset[str]] = frozenset({"k", "v", "wo"})
    needs_held: ClassVar[bool] = True

    epsilon: float = parameter(1e-4, "added to the scores of the second half", "score", 0)

    def start(self, head: Head, cuts: Cuts) -> Weighted:
        """Return the base's state, with the weights of all values."""
        norms = projected_norms(head, 1).mean(axis=0)
        return Weighted(**vars(super().start(head, cuts)), norms=norms)

    def score_held(
        self, held: Longs, limit: int, row: int, block: Block, state: BaseState
    ) -> Doubles:
        """Infinite for the first half."""
        scores = self.base_scores(held, limit, row, block, state)
        best = np.argsort(scores, kind="stable")[len(scores) - limit // 2 :]
        if not isinstance(state, Weighted):
            raise TypeError("the state is what `start` returned")
        weighted = (scores + self.epsilon) * state.norms[held]
        weighted[best] = np.inf
        return np.asarray(weighted)
