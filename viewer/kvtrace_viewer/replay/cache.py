"""What one policy's caches hold, at every budget at once, in one KV head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cutting import HELD, Bits, cut_lowest, cut_oldest
from kvtrace_viewer.replay.kernels import NEVER

Longs = NDArray[np.int64]
Scores = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Cuts:
    """The decisions of one policy: after which rows, and to how many tokens.

    Attributes
    ----------
    rows : int64 [cut]
        Rows after which the policy cuts, ascending.
    limits : int64 [cut, budget]
        Tokens held after the cut.
    sinks, recent : int64 [cut, budget]
        First positions and last positions that are protected; sinks + recent <= limits.
    """

    rows: Longs
    limits: Longs
    sinks: Longs
    recent: Longs

    def within(self, start: int, stop: int) -> Cuts:
        """Return the decisions after rows start..stop-1."""
        a, b = np.searchsorted(self.rows, (start, stop))
        return Cuts(self.rows[a:b], self.limits[a:b], self.sinks[a:b], self.recent[a:b])

    def allot(self, b: int, limit: int) -> None:
        """Set what budget `b` holds after the one decision here, protection clipped to it."""
        self.limits[0, b] = limit
        self.sinks[0, b] = min(self.sinks[0, b], limit)
        self.recent[0, b] = min(self.recent[0, b], limit - self.sinks[0, b])


class Cache:
    """The tokens one policy holds in one KV head, per budget.

    Attributes
    ----------
    cuts : Cuts
        All decisions over the request.
    barred : int32 [budget, token]
        BARRED (see `cutting`) for what was held and is no more, HELD for all others.
    counts : int64 [budget]
        Tokens held, of those that have been in.
    left : int64 [budget]
        Positions below have left the model's own window.
    joined : int
        Tokens that have been in: positions 0..joined-1.
    evicted_at : int32 [budget, token]
        Row after which a position was evicted, or left the model's own window; NEVER if held.
    ties : int64 [budget]
        Cuts whose margin (last kept minus first evicted) was 0.
    """

    def __init__(self, cuts: Cuts, window: int | None, evicted_at: NDArray[np.int32]) -> None:
        budgets, tokens = evicted_at.shape
        self.cuts = cuts
        self.window = window
        self.barred = np.full((budgets, tokens), HELD)
        self.counts = np.zeros(budgets, dtype=np.int64)
        self.left = np.zeros(budgets, dtype=np.int64)
        self._oldest = np.zeros(budgets, dtype=np.int64)
        self.joined = 0
        self.evicted_at = evicted_at
        self.ties = np.zeros(budgets, dtype=np.int64)
        evicted_at[:] = left_window(tokens, window)

    def cut(self, cuts: Cuts, scores: Scores) -> None:
        """Evict the lowest scores at each of `cuts`, equal scores the older token first.

        Parameters
        ----------
        cuts : Cuts
            Decisions that follow the last ones made.
        scores : float32 or float64 [cut, key] or [budget, cut, key]
            Higher = kept. One matrix for all budgets, or one each.
        """
        matrices = scores if scores.ndim == 3 else scores[None]
        budgets = len(self.counts)
        self._cut(cuts, matrices, np.arange(budgets) if len(matrices) > 1 else np.zeros(budgets))

    def cut_by(self, cuts: Cuts, matrices: Iterable[Scores], of_budget: Longs) -> None:
        """Cut as `cut` does, where some budgets share a matrix of scores.

        Parameters
        ----------
        matrices : iterable of float32 or float64 [cut, key]
            Each is used before the next is asked for.
        of_budget : int64 [budget]
            Number of the matrix that each budget has.
        """
        joined = self.joined
        for number, scores in enumerate(matrices):
            self.joined = joined
            self._cut(cuts, scores[None], np.where(of_budget == number, 0, -1))

    def _cut(self, cuts: Cuts, scores: Scores, of_budget: NDArray[Any]) -> None:
        if not len(cuts.rows):
            return
        # Writable whatever it was: numba compiles once more for arrays that are not.
        scores = np.require(scores, None, ["C", "W"])
        is_short = scores.dtype == np.float32
        bits: Bits = scores.view(np.int32) if is_short else scores.view(np.int64)
        cut_lowest(
            bits,
            of_budget.astype(np.int64),
            cuts.rows,
            cuts.limits,
            cuts.sinks,
            cuts.recent,
            self.window or 0,
            self.joined,
            self.barred,
            self.counts,
            self.left,
            self.evicted_at,
            self.ties,
            np.iinfo(bits.dtype).min,
            np.empty(cuts.rows[-1] + 1, np.int32),
        )
        self.joined = int(cuts.rows[-1]) + 1

    def cut_oldest(self, cuts: Cuts) -> None:
        """Evict the oldest unprotected tokens at each of `cuts`."""
        if not len(cuts.rows):
            return
        cut_oldest(
            cuts.rows,
            cuts.limits,
            cuts.sinks,
            self.window or 0,
            self.joined,
            self.barred,
            self.counts,
            self.left,
            self._oldest,
            self.evicted_at,
        )
        self.joined = int(cuts.rows[-1]) + 1

    def holds(self, row: int) -> NDArray[np.bool_]:
        """[budget, key]: whether the query of `row`, already decided, can read a key."""
        return self.evicted_at[:, : row + 1] >= row

    def held_before(self, row: int, b: int) -> NDArray[np.int64]:
        """Positions in budget b's cache at the cut after `row`, ascending."""
        held = np.flatnonzero(self.barred[b, : row + 1] < 0)
        return np.asarray(held if self.window is None else held[held > row + 1 - self.window])


def left_window(tokens: int, window: int | None) -> NDArray[np.int32]:
    """[token]: the last row whose query the model itself lets see the position, NEVER if all."""
    if window is None or window > tokens:
        return np.full(tokens, NEVER, dtype=np.int32)
    last = np.arange(tokens, dtype=np.int64) + window - 1
    return np.where(last < tokens, last, NEVER).astype(np.int32)


def present(rows: Longs, window: int | None) -> Longs:
    """Tokens present at a decision after each row: those the model lets the next query see."""
    return rows + 1 if window is None else np.minimum(rows + 1, max(window - 1, 1))
