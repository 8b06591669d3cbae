"""What a policy that knows the future could keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import BLOCK_ROWS, Block, Head
from kvtrace_viewer.replay.bounds import Foreseen
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.prices import sweep

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

SNAPSHOT_BYTES = 1 << 26
"""Of a head's values that are remembered; what lies between them is computed once more."""

LEAST_PRICE, HIGHEST_PRICE = 0.01, 40.0
"""In uniform shares. At 0.01 nearly every token is worth its slot, at 40 hardly any is."""


@dataclass(frozen=True, kw_only=True)
class Oracle(Policy):
    """Know the future: keep what will be attended to most, and bound what any policy can keep.

    One decision: the tokens with most future attention, which is optimal. Repeated decisions:
    a slot costs c/(i+1) at row i (c in uniform shares), and a token's value after row i is

        V_i[j] = max(0, a[i,j] - c/(i+1) + V_{i+1}[j])

    with a summed over the query heads of the group; the least V is evicted. The dual sum
    (slots paid, plus the value of every token at its first measured row, plus what is visible
    in any case) bounds the mass of every policy under the same budget, for any c >= 0; the
    least over the prices is the `bound`, and its price makes the schedule. Ours; dropping the
    least future attention is not optimal for repeated cuts.

    Three refinements, none of which a policy can beat either: the max is taken only where a cut
    can follow, tokens pay only from their first cut on (both for `every=N`), and of the tokens
    before the first cut only the B most valuable count, because no more survive it.
    """

    name: ClassVar[str] = "oracle"
    looks_ahead: ClassVar[bool] = True

    prices: int = parameter(16, "prices tried, spaced evenly in log from 0.01 to 40", "prices", 1)

    @property
    def prompt_queries(self) -> int:
        """None of them: only what comes after the first cut counts."""
        return 0

    def start(self, head: Head, cuts: Cuts) -> Foresight:
        """Return the state: nothing known yet."""
        return Foresight(head, cuts, self.prices)

    def look_ahead(self, block: Block, cuts: Cuts, state: Foresight) -> None:
        """Carry values and the dual sum one block towards the start."""
        state.keep(block, is_needed=len(cuts.rows) > 0)
        last_cut = state.last_cut[block.start : block.stop]
        rows = np.arange(block.start, block.stop)
        seen = last_cut >= 0
        own = block.received[np.arange(len(rows)), rows]
        state.free += float(own[seen].cumsum()[-1]) if seen.any() else 0.0
        sweep(
            block.received,
            block.start,
            state.prices,
            np.isin(rows, cuts.rows),
            last_cut,
            int(state.cuts.rows[0]),
            state.values,
            state.worth,
            np.empty((len(state.prices), 0, block.stop)),
        )
        measured = np.flatnonzero(last_cut >= 0)
        if len(measured):
            at = np.searchsorted(state.cuts.rows, last_cut[measured])
            slots = np.minimum(state.cuts.limits[at], last_cut[measured, None] + 1)
            shares = 1.0 / (block.start + measured + 1)
            # cumsum adds row by row; sum would round by the number of budgets.
            paid = (slots * shares[:, None]).cumsum(axis=0)[-1]
            state.paid += np.outer(paid, state.prices)

    def decide(self, block: Block, cuts: Cuts, state: Foresight, cache: Cache) -> None:
        """Cut by the values at the price that bounds each budget best."""
        if not len(cuts.rows):
            return
        chosen, of_budget = state.chosen
        later = state.values_after(block)
        lines = (
            self._values(block, cuts, state, later[i : i + 1], k) for i, k in enumerate(chosen)
        )
        cache.cut_by(cuts, lines, of_budget)

    def _values(
        self, block: Block, cuts: Cuts, state: Foresight, values: Doubles, k: int
    ) -> Doubles:
        """Values [cut, key] at price k, from those [1, key] after the block.

        In memory that the next call uses again.
        """
        shape = (1, len(cuts.rows), block.stop)
        out: Doubles = state.memory[: len(cuts.rows) * block.stop].reshape(shape)
        sweep(
            block.received,
            block.start,
            state.prices[k : k + 1],
            np.isin(np.arange(block.start, block.stop), cuts.rows),
            state.last_cut[block.start : block.stop],
            int(state.cuts.rows[0]),
            values,
            np.zeros(1),
            out,
        )
        return np.asarray(out[0])

    def bound(self, state: Foresight) -> Doubles:
        """Most attention any policy can keep in this head, summed over rows and query heads."""
        least: Doubles = state.free + state.duals.min(axis=1)
        return least

    def foreseen(self, state: Foresight) -> Foreseen:
        """Return this head's part of what several retain at most that share their budgets."""
        first_cut = int(state.cuts.rows[0])
        return Foreseen(
            prices=state.prices,
            certain=state.free + state.worth,
            valued=[np.sort(line[line > 0]) for line in state.values[:, : first_cut + 1]],
            cuts=state.cuts.rows,
            limits=state.cuts.limits,
            last_cut=state.last_cut,
        )


class Foresight:
    """What the oracle knows of one head.

    Attributes
    ----------
    prices : float64 [price], of a slot at row i in units of 1/(i+1), summed over the group
    values : float64 [price, token], after the rows seen so far (last first)
    worth : float64 [price], values of tokens that joined after the first cut
    paid : float64 [budget, price], slots at their prices
    free : float, each query's attention to its own token
    last_cut : int64 [token], the last cut before a row, -1 for rows that are not measured
    snapshots : values at the end of some blocks, by their start
    passed : (start, stop, whether it has cuts) of the blocks seen, the last first
    between : values at the chosen prices at the end of blocks between two snapshots, by start
    """

    def __init__(self, head: Head, cuts: Cuts, prices: int) -> None:
        self.cuts = cuts
        grid = np.geomspace(LEAST_PRICE, HIGHEST_PRICE, prices) * head.group
        self.prices = grid if len(cuts.rows) > 1 else np.zeros(1)
        self.values = np.zeros((len(self.prices), head.tokens))
        self.worth = np.zeros(len(self.prices))
        self.paid = np.zeros((cuts.limits.shape[1], len(self.prices)))
        self.free = 0.0
        self.snapshots: dict[int, Doubles] = {}
        self.passed: list[tuple[int, int, bool]] = []
        self.between: dict[int, Doubles] = {}
        self.apart = -(-self.values.nbytes * head.tokens // (BLOCK_ROWS * SNAPSHOT_BYTES))
        self.memory = np.empty(BLOCK_ROWS * head.tokens)  # new pages cost more than what they hold
        rows = np.arange(head.tokens)
        earlier = np.searchsorted(cuts.rows, rows) - 1
        padded = np.append(cuts.rows, -1)
        self.last_cut = np.where(head.has_query, padded[earlier], -1)

    def keep(self, block: Block, is_needed: bool) -> None:
        """Remember the values after a block, or only how to come to them again."""
        if sum(needed for *_, needed in self.passed) % self.apart == 0 and is_needed:
            self.snapshots[block.start] = self.values[:, : block.stop].copy()
        self.passed.append((block.start, block.stop, is_needed))

    def values_after(self, block: Block) -> Doubles:
        """[chosen price, key]: values after a block; blocks are asked for in order."""
        if block.start not in self.between:
            nearest = min(start for start in self.snapshots if start >= block.start)
            values = self.snapshots.pop(nearest)[self.chosen[0]]
            for start, stop, is_needed in self.passed:
                if block.start <= start <= nearest:
                    if is_needed:
                        self.between[start] = values[:, :stop].copy()
                    if start > block.start:
                        self._carry(block.head, start, stop, values)
        return self.between.pop(block.start)

    def _carry(self, head: Head, start: int, stop: int, values: Doubles) -> None:
        """Carry values at the chosen prices over a block whose rows are computed once more."""
        sweep(
            Block(head, start, stop, head.attention(start, stop)).received,
            start,
            self.prices[self.chosen[0]],
            np.isin(np.arange(start, stop), self.cuts.rows),
            self.last_cut[start:stop],
            int(self.cuts.rows[0]),
            values,
            np.zeros(len(values)),
            np.empty((len(values), 0, stop)),
        )

    @cached_property
    def chosen(self) -> tuple[Longs, Longs]:
        """The prices that bound some budget best, and which of them is whose."""
        prices, of_budget = np.unique(self.duals.argmin(axis=1), return_inverse=True)
        return prices, of_budget

    @cached_property
    def duals(self) -> Doubles:
        """Bounds [budget, price] on the attention kept to other tokens than a query's own.

        Asked once all is seen.
        """
        first_cut = int(self.cuts.rows[0])
        values = np.sort(self.values[:, : first_cut + 1], axis=1)[:, ::-1]
        best = np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)
        kept = np.minimum(self.cuts.limits[0], first_cut + 1)
        bounds: Doubles = self.worth + self.paid + best[:, kept].T
        return bounds
