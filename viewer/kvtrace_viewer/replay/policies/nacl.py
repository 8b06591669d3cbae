"""Proxy tokens and chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.policy import Policy, parameter

THIRTY = parse_amount("30%", "sampled", "sampled=30%")


@dataclass(frozen=True, kw_only=True)
class NACL(Policy):
    """Keep what the prompt's last tokens attend to, and draw the rest of the budget at random.

    Chen et al. 2024, "NACL: A General and Effective KV Cache Eviction Framework for LLMs at
    Inference Time", arXiv:2408.03675. Attention of the last `proxies` queries is summed; the best
    keep their place, and `sampled` of the budget is drawn without replacement from the softmax of
    the sums, per head (as the highest of sum + Gumbel noise). Deviations: the proxies are the
    last tokens, which stay (the paper takes the question's), and the group's query heads are
    averaged. A real run is equalled only with the same draws.

    Signals: q, k, and the seed.
    """

    name: ClassVar[str] = "nacl"
    default_when: ClassVar[str] = "prefill"
    needs_held: ClassVar[bool] = True

    proxies: int = parameter(64, "last queries whose attention counts; they stay", "tokens", 1)
    sampled: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        THIRTY, "part of the budget that is drawn", "tokens or % of budget"
    )
    seed: int = parameter(0, "seed of the draws", "seed", 0)

    @property
    def least_recent(self) -> int:
        """The proxies."""
        return self.proxies

    @property
    def prompt_queries(self) -> int:
        """The proxies."""
        return self.proxies

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Sums, infinite for the best, noised for the others."""
        first = max(row + 1 - self.proxies, 0)
        sums = block.head.attention(first, row + 1).sum(axis=(0, 1), dtype=np.float64)[held]
        sums /= block.head.group
        drawn = int(self.sampled.of(np.array([limit]))[0])
        protected = (held < self.sinks) | (held > row - min(self.proxies, limit))
        best = max(limit - drawn - int(protected.sum()), 0)
        head = block.head
        stream = np.random.default_rng([self.seed, head.layer, head.kv_head, row])
        scores = np.asarray(sums + stream.gumbel(size=row + 1)[held])
        order = np.argsort(np.where(protected, -np.inf, sums), kind="stable")
        scores[order[len(order) - best :]] = np.inf
        return scores
