"""Keys and values against those that come next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keep, in each stretch of tokens, those that stand out against the next stretch.

    Liang et al. 2025, "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
    Important", arXiv:2504.04704. After the sinks, partitions of `lag` tokens: keys and values are
    min-max normalised per channel by the next partition, their standard deviation over the
    channels goes through a softmax within the partition, and the mean of both is ranked within
    it. The last partition and the incomplete rest stay. Where there are not two partitions, the
    younger is higher.
    """

    name: ClassVar[str] = "lagkv"
    signals: ClassVar[frozenset[str]] = frozenset({"k", "v"})
    default_when: ClassVar[str] = "prefill"

    sinks: int = parameter(4, "first tokens that are never evicted", "tokens", 0)
    lag: int = parameter(128, "tokens of a partition", "tokens", 2)

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[token]: rank within the partition, in [0, 1); 1 where no partition follows."""
        ranks = np.ones(head.tokens)
        parts = (head.tokens - self.sinks) // self.lag
        if parts >= 2:
            if head.v is None:
                raise ValueError("lagkv declares v; the engine checks that the trace has it")
            span = slice(self.sinks, self.sinks + parts * self.lag)
            score = self._standing_out(head.k[span]) + self._standing_out(head.v[span])
            order = np.argsort(np.argsort(score / 2, axis=1, kind="stable"), axis=1)
            ranks[self.sinks : self.sinks + order.size] = order.ravel() / self.lag
        return ranks

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rank within a partition that a whole one follows."""
        out = np.ones((len(cuts.rows), block.stop))
        for c, row in enumerate(cuts.rows):
            parts = (row + 1 - self.sinks) // self.lag
            if parts < 2:
                out[c] = np.arange(block.stop)
            else:
                ranked = self.sinks + (parts - 1) * self.lag
                out[c, :ranked] = state[:ranked]
        return out

    def _standing_out(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """[partition but the last, token]."""
        parts = vectors.astype(np.float64).reshape(-1, self.lag, vectors.shape[1])
        low = parts[1:].min(axis=1, keepdims=True)
        high = parts[1:].max(axis=1, keepdims=True)
        spread = ((parts[:-1] - low) / np.maximum(high - low, 1e-12)).std(axis=2, ddof=1)
        shares = np.exp(spread - spread.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))
