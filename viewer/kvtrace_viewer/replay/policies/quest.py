"""Pages, for every query anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.jit import jit, jit_least
from kvtrace_viewer.replay.policy import parameter
from kvtrace_viewer.replay.selector import Selector

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Quest(Selector):
    """Read, for every query, the pages whose keys could be attended to most; evict nothing.

    Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arXiv:2406.10774. A page's score is the most that q k can be for keys between its per-channel
    minimum and maximum. Deviations: scores are summed over the group's query heads, which read
    the same pages; the first two layers are not exempt; where the budget is no multiple of the
    page, the last page chosen is read in part, its youngest tokens.

    Signals: q, k.
    """

    name: ClassVar[str] = "quest"

    page: int = parameter(16, "tokens of a page", "tokens", 1)

    @property
    def prompt_queries(self) -> int:
        """None: a query chooses for itself."""
        return 0

    def select(
        self, block: Block, rows: Longs, limits: Longs, cache: Cache, state: Any
    ) -> NDArray[np.bool_]:
        """Read whole pages, best first."""
        chosen = np.zeros((limits.shape[1], len(rows), block.stop), dtype=np.bool_)
        head, evicted_at = block.head, cache.evicted_at[:, : block.stop]
        _read_pages(head.q[rows], head.k, rows, limits, evicted_at, self.page, chosen)
        return chosen


@jit
def _read_pages(
    queries: Floats,
    keys: Floats,
    rows: Longs,
    limits: Longs,
    evicted_at: NDArray[np.int32],
    page: int,
    chosen: NDArray[np.bool_],
) -> None:
    """Mark in chosen [budget, row, key] what is read; what budgets hold alike is ranked once."""
    for r in range(rows.shape[0]):
        row = rows[r]
        held = np.flatnonzero(evicted_at[0, :row] >= row)
        firsts, order = _ranked_pages(queries[r], keys, held, page)
        for b in range(limits.shape[1]):
            if b > 0 and not _is_held_alike(evicted_at[b - 1], evicted_at[b], row):
                held = np.flatnonzero(evicted_at[b, :row] >= row)
                firsts, order = _ranked_pages(queries[r], keys, held, page)
            left = limits[r, b]
            for p in order[::-1]:
                first = max(firsts[p], firsts[p + 1] - left)
                for s in range(first, firsts[p + 1]):
                    chosen[b, r, held[s]] = True
                left -= firsts[p + 1] - first


@jit
def _is_held_alike(one: NDArray[np.int32], other: NDArray[np.int32], row: int) -> bool:
    apart = 0
    for j in range(row):
        apart += (one[j] >= row) != (other[j] >= row)
    return apart == 0


@jit
def _ranked_pages(query: Floats, keys: Floats, held: Longs, page: int) -> tuple[Longs, Longs]:
    """Return where each page begins in held (and ends), and the pages from worst to best.

    Of pages with equal scores the younger is the better one.
    """
    firsts, count, dims = np.empty(held.shape[0] + 1, np.int64), 0, keys.shape[1]
    scores = np.empty(held.shape[0])
    positive, negative = np.zeros(dims), np.zeros(dims)
    for g in range(query.shape[0]):
        for d in range(dims):
            positive[d] += max(query[g, d], np.float32(0))
            negative[d] += min(query[g, d], np.float32(0))
    first = 0
    while first < held.shape[0]:
        last = first + 1
        while last < held.shape[0] and held[last] // page == held[first] // page:
            last += 1
        firsts[count] = first
        scores[count] = _most(positive, negative, keys, held[first:last])
        count += 1
        first = last
    firsts[count] = first
    return firsts, np.argsort(scores[:count], kind="mergesort")


@jit_least
def _most(positive: Doubles, negative: Doubles, keys: Floats, held: Longs) -> float:
    """Most that a query can give keys between the least and the greatest of each channel."""
    low, high = keys[held[0]].copy(), keys[held[0]].copy()
    for j in held[1:]:
        key = keys[j]
        for d in range(key.shape[0]):
            low[d] = min(low[d], key[d])
            high[d] = max(high[d], key[d])
    total = 0.0
    for d in range(low.shape[0]):
        total += positive[d] * high[d] + negative[d] * low[d]
    return total
