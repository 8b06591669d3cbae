"""What heads that share a budget can retain together: the oracle's bound, where budgets move.

The bound of one head charges a token for its slot at every row, by one price. Where several heads
share their budgets, so that any of them may hold any part of the sum, one price for all of them
bounds what they retain in sum: the relaxed problem falls apart into the same values per token,
and only the slots are paid together. Of the tokens before the first cut, the most valuable of all
heads count, as many as all heads may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.engine import HeadReplay

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Foreseen:
    """One head's part of a bound over several, once the oracle has seen all rows.

    Attributes
    ----------
    prices : float64 [price]
        Of a slot at row i, in units of 1/(i+1), summed over the group; ascending.
    certain : float64 [price]
        What tokens are worth that join after the first cut, and every query's own.
    valued : list by price of float64 [token]
        What tokens are worth at the first cut, where that is above 0; ascending.
    cuts : int64 [cut]
    limits : int64 [cut, budget]
    last_cut : int64 [row], the last cut before a row, -1 for rows that are not measured
    """

    prices: Doubles
    certain: Doubles
    valued: list[Doubles]
    cuts: Longs
    limits: Longs
    last_cut: Longs


def bound_together(heads: Sequence[Foreseen]) -> Doubles:
    """Most attention [budget] that heads can retain in sum, whoever has how much of the budget."""
    limits = np.sum([one.limits for one in heads], axis=0)
    # A row that some head measures is paid by all: another head's tokens may use the slots.
    last_cut = np.max([one.last_cut for one in heads], axis=0)
    measured = np.flatnonzero(last_cut >= 0)
    at = np.searchsorted(heads[0].cuts, last_cut[measured])
    slots = np.minimum(limits[at], len(heads) * (last_cut[measured, None] + 1))
    paid = (slots / (measured[:, None] + 1)).sum(axis=0)
    first = np.minimum(limits[0], len(heads) * (heads[0].cuts[0] + 1))
    # Groups of another size have other prices: a lower one there gives a bound that is looser.
    prices = max((one.prices for one in heads), key=lambda line: float(line[-1]))
    duals = np.empty((len(paid), len(prices)))
    for k, price in enumerate(prices):
        of_head = [int(np.searchsorted(one.prices, price, side="right")) - 1 for one in heads]
        certain = sum(float(one.certain[i]) for one, i in zip(heads, of_head, strict=True))
        valued = [one.valued[i] for one, i in zip(heads, of_head, strict=True)]
        best = np.sort(np.concatenate(valued), kind="stable")[::-1].cumsum()
        most = np.append(0.0, best)[np.minimum(first, len(best))]
        duals[:, k] = certain + price * paid + most
    return np.asarray(duals.min(axis=1))


@dataclass(eq=False)
class MovingBounds:
    """Bounds [pair] over the heads of a layer and over all heads, summed over requests.

    Attributes
    ----------
    pairs : int
    of_layers : dict of int to float64 [pair], NaN for all but the oracle's
    of_model : float64 [pair], NaN for all but the oracle's
    beyond : bool [pair]
        Whether a policy that moves budgets takes more in sum than equal budgets have.
    """

    pairs: int
    of_layers: dict[int, Doubles] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of_model = np.zeros(self.pairs)
        self.beyond = np.zeros(self.pairs, np.bool_)
        self._seen: dict[int, list[Foreseen]] = {}
        self._excess: dict[int, Longs] = {}
        self._columns: list[slice] = []

    def add(self, layer: int, heads: Sequence[HeadReplay]) -> None:
        """Add a layer of the request that is replayed."""
        total = self.of_layers.setdefault(layer, np.zeros(self.pairs))
        bounds = np.full(self.pairs, np.nan)
        self._columns = [run.columns for run in heads[0].runs]
        for r, run in enumerate(heads[0].runs):
            states = [head.runs[r] for head in heads]
            seen = [one.foreseen() for one in states]
            together = [one for one in seen if one is not None]
            if together:
                bounds[run.columns] = bound_together(together)
                self._seen.setdefault(r, []).extend(together)
            if run.policy.bound_scope == "model":
                excess = np.sum([_excess(head, r) for head in heads], axis=0)
                self._excess[r] = excess + self._excess.get(r, np.int64(0))
        total += bounds

    def end_request(self) -> None:
        """Bound all layers together."""
        bounds = np.full(self.pairs, np.nan)
        for r, columns in enumerate(self._columns):
            if r in self._seen:
                bounds[columns] = bound_together(self._seen[r])
            if r in self._excess:
                self.beyond[columns] |= (self._excess[r] > 0).any(axis=0)
        self.of_model += bounds
        self._seen, self._excess = {}, {}


def _excess(found: HeadReplay, r: int) -> Longs:
    """Slots [cut, budget] that one head may fill beyond what an equal budget gives it."""
    run = found.runs[r]
    there = present(run.cuts.rows, found.head.window)
    equal = np.stack([budget.limits(there) for budget in run.budgets], axis=1)
    return np.asarray(
        np.minimum(run.cuts.limits, there[:, None]) - np.minimum(equal, there[:, None])
    )
