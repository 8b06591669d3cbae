"""Heavy hitters and the recent past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.cutting import HELD, evict, leave_window
from kvtrace_viewer.replay.jit import jit, jit_sum
from kvtrace_viewer.replay.policy import Policy, parameter

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
                _accumulate(block.attention, block.row_sums + block.sink_share, state)
            cache.cut(cuts, state[:, None, : block.stop])
        else:
            _renormalised(
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
                cache.gone,
                cache.counts,
                cache.left,
                cache.evicted_at,
                cache.ties,
            )
            cache.joined = block.stop


@jit
def _accumulate(
    attention: NDArray[np.float32], totals: NDArray[np.float64], state: NDArray[np.float64]
) -> None:
    """Add a block's full rows, each over its total, to every budget's sums."""
    group, rows, stop = attention.shape
    added = np.zeros(stop)
    for r in range(rows):
        for g in range(group):
            if totals[g, r] > 0:
                share = 1.0 / totals[g, r]
                for j in range(stop):
                    added[j] += attention[g, r, j] * share
    for b in range(state.shape[0]):
        for j in range(stop):
            state[b, j] += added[j]


@jit
def _renormalised(
    attention: NDArray[np.float32],
    sink_share: NDArray[np.float64],
    start: int,
    state: NDArray[np.float64],
    cut_rows: NDArray[np.int64],
    limits: NDArray[np.int64],
    sinks: NDArray[np.int64],
    recent: NDArray[np.int64],
    window: int,
    joined: int,
    gone: NDArray[np.int64],
    counts: NDArray[np.int64],
    left: NDArray[np.int64],
    evicted_at: NDArray[np.int32],
    ties: NDArray[np.int64],
) -> None:
    """Row by row: the row joins, its kept part is renormalised and added, then the cut.

    Sums are never negative: as integers their bits are of the same order.
    """
    group, rows, stop = attention.shape
    budgets = counts.shape[0]
    wide = np.empty((group, stop))
    held = np.empty((budgets, stop))
    for b in range(budgets):
        _mark(gone[b, :stop], held[b])
        counts[b] += start - joined
    c = 0
    for r in range(rows):
        row = start + r
        for g in range(group):  # to float64 once, not for every budget
            wide[g, : row + 1] = attention[g, r, : row + 1]
        is_cut = c < len(cut_rows) and cut_rows[c] == row
        for b in range(budgets):
            _add_kept(wide, r, row + 1, sink_share, held[b], state[b])
            counts[b] += 1
            if window > 0:
                held[b, left[b] : max(row + 2 - window, left[b])] = 0
                leave_window(gone[b], counts, left, b, row + 1 - window)
            surplus = counts[b] - limits[c, b] if is_cut else 0
            if surplus > 0:
                low, high = max(sinks[c, b], left[b]), row + 1 - recent[c, b]
                keys = state[b].view(np.int64)
                ties[b] += evict(keys, gone[b], low, high, surplus, row, evicted_at[b])
                counts[b] -= surplus
                _mark(gone[b, low:high], held[b, low:high])
        c += is_cut


@jit
def _mark(gone: NDArray[np.int64], held: NDArray[np.float64]) -> None:
    for j in range(len(gone)):
        held[j] = gone[j] == HELD


@jit
def _add_kept(
    wide: NDArray[np.float64],
    r: int,
    keys: int,
    sink_share: NDArray[np.float64],
    held: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    """Add what is kept of row r, renormalised in each query head, two heads at a time."""
    group = wide.shape[0]
    for g in range(0, group, 2):
        other = min(g + 1, group - 1)  # of an odd group the last comes twice, with a share of 0
        row, beside = wide[g, :keys], wide[other, :keys]
        mass, other_mass = _kept(row, beside, held[:keys])
        share = 1.0 / (mass + sink_share[g, r]) if mass > 0 else 0.0
        pays = other > g and other_mass > 0
        other_share = 1.0 / (other_mass + sink_share[other, r]) if pays else 0.0
        _add(row, beside, share, other_share, held[:keys], sums[:keys])


@jit_sum
def _kept(
    row: NDArray[np.float64], other: NDArray[np.float64], held: NDArray[np.float64]
) -> tuple[float, float]:
    total, other_total = 0.0, 0.0
    for j in range(held.shape[0]):
        total += row[j] * held[j]
        other_total += other[j] * held[j]
    return total, other_total


@jit
def _add(
    row: NDArray[np.float64],
    other: NDArray[np.float64],
    share: float,
    other_share: float,
    held: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    for j in range(held.shape[0]):
        sums[j] += (row[j] * share + other[j] * other_share) * held[j]
