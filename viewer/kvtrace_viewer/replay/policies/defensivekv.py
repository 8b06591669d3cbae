"""The worst case of the last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policies.adakv import compete
from kvtrace_viewer.replay.policies.criticalkv import projected_norms
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.windows import voting_rows

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(Policy):
    """Keep what any of the last queries attended to most, weighed by the value, across heads.

    Feng et al. 2025, "Taming the Fragility of KV Cache Eviction in LLM Inference",
    arXiv:2510.13334. The highest attention of the last `window` queries and of the group's query
    heads, at least its mean over the head's keys, times the L1 norm of W_o v (mean over the
    group); the budget is shared among a layer's heads as in adakv. The window itself stays.
    Deviation: the two stages of criticalkv, which the paper's code builds on, are left out.

    Signals: q, k, v, wo.
    """

    name: ClassVar[str] = "defensivekv"
    signals: ClassVar[frozenset[str]] = frozenset({"q", "k", "v", "wo"})
    default_when: ClassVar[str] = "prefill"
    shares_heads: ClassVar[bool] = True

    window: int = parameter(32, "last queries that vote; their tokens stay", "tokens", 1)
    alpha: float = parameter(0.2, "share of the budget that a head keeps in any case", "share", 0)

    @property
    def least_recent(self) -> int:
        """The window."""
        return self.window

    @property
    def prompt_queries(self) -> int:
        """The window."""
        return self.window

    def start(self, head: Head, cuts: Cuts) -> Doubles:
        """[token]: weights of the values."""
        return np.asarray(projected_norms(head, 1).mean(axis=0))

    def scores(self, block: Block, cuts: Cuts, state: Doubles) -> Doubles:
        """Return the defended maximum; the window, which stays anyway, gets none."""
        out = np.zeros((len(cuts.rows), block.stop))
        voting = cuts.rows[cuts.rows >= self.window]
        if not len(voting):
            return out
        rows, first = voting_rows(block, int(voting[0]), self.window)
        by_row = rows.max(axis=0)
        for c, row in enumerate(cuts.rows):
            voted = int(row) + 1 - self.window
            if voted > 0:
                highest = by_row[voted - first : row + 1 - first, :voted].max(axis=0)
                highest = highest.astype(np.float64)
                out[c, :voted] = np.maximum(highest, highest.mean()) * state[:voted]
        return out

    def allocate(self, scores: list[Doubles], limits: Longs) -> Longs:
        """Let the heads compete."""
        return compete(scores, limits, self.alpha)
