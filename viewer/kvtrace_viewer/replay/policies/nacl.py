"""Proxy tokens and chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.windows import voting_rows, window_sums

Votes = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""By decision row: what its proxies attend to [key], and its noise [key]."""

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

    def start(self, head: Head, cuts: Cuts) -> Votes:
        """Return no votes."""
        return {}

    def see(self, block: Block, cuts: Cuts, state: Votes) -> None:
        """Sum what the proxies of each decision attend to, and draw its noise."""
        state.clear()
        if not len(cuts.rows):
            return
        rows, first = voting_rows(block, int(cuts.rows[0]), self.proxies)
        received = rows.sum(axis=0, dtype=np.float64) / block.head.group
        before = np.zeros((max(self.proxies - 1 - int(cuts.rows[0]) + first, 0), block.stop))
        sums = window_sums(np.concatenate([before, received]), self.proxies)
        head = block.head
        for row in cuts.rows.tolist():
            stream = np.random.default_rng([self.seed, head.layer, head.kv_head, row])
            state[row] = sums[row - int(cuts.rows[0])], stream.gumbel(size=row + 1)

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Votes
    ) -> NDArray[np.float64]:
        """Sums, infinite for the best, noised for the others."""
        sums, noise = (line[held] for line in state[row])
        drawn = int(self.sampled.of(np.array([limit]))[0])
        protected = (held < self.sinks) | (held > row - min(self.proxies, limit))
        best = max(limit - drawn - int(protected.sum()), 0)
        scores = np.asarray(sums + noise)
        order = np.argsort(np.where(protected, -np.inf, sums), kind="stable")
        scores[order[len(order) - best :]] = np.inf
        return scores
