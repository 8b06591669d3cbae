"""Heavy hitters and the recent past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.renormalised import accumulate_and_cut, add_shares

HALF = parse_amount("50%", "recent", "recent=50%")


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keep the tokens that received most attention so far, and the most recent ones.

    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", arXiv:2306.14048. Attention is accumulated over all rows and summed over
    the query heads of the group (the paper has one query head per KV head). The accumulated
    sums are carried across evictions.
    """

    name: ClassVar[str] = "h2o"
    takes_received: ClassVar[bool] = True

    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        HALF, "last tokens that are never evicted", "tokens or % of budget"
    )
    renormalise: bool = parameter(
        True,
        "accumulate rows renormalised over what was kept, as a real run would see them; "
        "false is cheaper",
    )

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[1 or budget, token]: accumulated attention."""
        budgets = cuts.limits.shape[1] if self.renormalise else 1
        return np.tile(head.received_in_prompt, (budgets, 1))

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Attention accumulated over full-cache rows."""
        sums = block.newly_received.cumsum(axis=0)
        sums += state[0, : block.stop]
        state[0, : block.stop] = sums[-1]
        return sums[cuts.rows - block.start]

    def decide(self, block: Block, cuts: Cuts, state: NDArray[np.float64], cache: Cache) -> None:
        """Accumulate and cut, row by row where rows depend on what was kept."""
        if not self.renormalise:
            cache.cut(cuts, self.scores(block, cuts, state))
        elif not len(cache.cuts.rows) or cache.cuts.rows[0] >= block.stop - 1:
            # Nothing is evicted before this block's last row: every budget sees full rows.
            if not block.is_summed:
                _accumulate(block, state)
            cache.cut(cuts, state[:, None, : block.stop])
        else:
            accumulate_and_cut(
                block.attention,
                block.sink_share,
                block.start,
                state,
                cuts.rows,
                cuts.limits,
                cuts.sinks,
                cuts.recent,
                cache.window or 0,
                cache.joined,
                cache.barred,
                cache.counts,
                cache.left,
                cache.evicted_at,
                cache.ties,
            )
            cache.joined = block.stop


def _accumulate(block: Block, state: NDArray[np.float64]) -> None:
    """Add a block's full rows, each over its total, to every budget's sums, so far the same."""
    totals = (block.row_sums + block.sink_share).reshape(1, -1)
    shares = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
    add_shares(block.attention.reshape(totals.size, -1), shares, state[:1])
    state[1:, : block.stop] = state[0, : block.stop]
