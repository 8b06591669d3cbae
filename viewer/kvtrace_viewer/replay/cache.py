"""What one policy's caches hold, at every budget at once, in one KV head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cutting import HELD, cut_lowest, cut_oldest
from kvtrace_viewer.replay.kernels import NEVER

Longs = NDArray[np.int64]


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
    gone : int64 [budget, token]
        `cutting.GONE` for what was held and is no more, else `cutting.HELD`.
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
        self.gone = np.full((budgets, tokens), HELD)
        self.counts = np.zeros(budgets, dtype=np.int64)
        self.left = np.zeros(budgets, dtype=np.int64)
        self._oldest = np.zeros(budgets, dtype=np.int64)
        self._keys = np.empty(tokens, dtype=np.int64)
        self.joined = 0
        self.evicted_at = evicted_at
        self.ties = np.zeros(budgets, dtype=np.int64)
        evicted_at[:] = left_window(tokens, window)

    def cut(self, cuts: Cuts, scores: NDArray[np.float64]) -> None:
        """Evict the lowest scores at each of `cuts`, equal scores the older token first.

        Parameters
        ----------
        cuts : Cuts
            Decisions that follow the last ones made.
        scores : float64 [cut, key] or [budget, cut, key]
            Higher = kept. One matrix for all budgets, or one each.
        """
        if not len(cuts.rows):
            return
        if scores.ndim == 2:
            scores = scores[None]
        cut_lowest(
            # Writable whatever it was: numba compiles once more for arrays that are not.
            np.require(scores, np.float64, ["C", "W"]),
            cuts.rows,
            cuts.limits,
            cuts.sinks,
            cuts.recent,
            self.window or 0,
            self.joined,
            self.gone,
            self.counts,
            self.left,
            self.evicted_at,
            self.ties,
            self._keys,
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
            self.gone,
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
        held = np.flatnonzero(self.gone[b, : row + 1] == HELD)
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
