"""Attention output error of dropping a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.jit import jit_sum
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class CAOTE(Policy):
    """Evict the token whose absence changes the last query's attention output least.

    Goel et al. 2025, "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token
    Eviction", arXiv:2504.14051. Without token j, output o becomes (o - a v) / (1 - a), a change of
    a / (1 - a) * |o - v|, with a over what is held. Deviations: a is the last row's attention (the
    paper also takes it from other policies' scores), and the mean over the group's query heads is
    ranked, which the paper, with a value per query head, leaves open.

    Signals: q, k, v.
    """

    name: ClassVar[str] = "caote"
    signals: ClassVar[frozenset[str]] = frozenset({"q", "k", "v"})
    needs_held: ClassVar[bool] = True

    @property
    def prompt_queries(self) -> int:
        """The last, for a cut right after the prompt."""
        return 1

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Change of the output, mean over the group."""
        if block.head.v is None:
            raise ValueError("caote declares v; the engine checks that the trace has it")
        r = row - block.start
        return _changes(block.attention[:, r], block.sink_share[:, r], held, block.head.v)


@jit_sum
def _changes(
    attention: NDArray[np.float32],
    sink_share: NDArray[np.float64],
    held: NDArray[np.int64],
    values: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Return [held]: a / (1 - a) * |o - v|, mean over the query heads of attention [head, key]."""
    group, dims = attention.shape[0], values.shape[1]
    changes: NDArray[np.float64] = np.zeros(held.shape[0])
    output = np.empty(dims)
    for g in range(group):
        total = sink_share[g]
        output[:] = 0
        for j in held:
            share = np.float64(attention[g, j])
            total += share
            for d in range(dims):
                output[d] += share * values[j, d]
        whole = max(total, 1e-300)
        output /= whole
        for s in range(held.shape[0]):
            value, apart = values[held[s]], 0.0
            for d in range(dims):
                off = output[d] - value[d]
                apart += off * off
            share = attention[g, held[s]] / whole
            changes[s] += share / max(1 - share, 1e-12) * np.sqrt(apart)
    changes /= group
    return changes
