"""Pages, for every query anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.policy import parameter
from kvtrace_viewer.replay.selector import Selector

Doubles = NDArray[np.float64]
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
        for r, row in enumerate(rows):
            holds = cache.holds(int(row))
            for b in range(len(holds)):
                held = np.flatnonzero(holds[b, :row])
                if len(held) > limits[r, b]:
                    order = self._order(block.head, int(row), held)
                    held = held[order[len(order) - limits[r, b] :]]
                chosen[b, r, held] = True
        return chosen

    def _order(self, head: Head, row: int, held: Longs) -> Longs:
        """Tokens from the one to read last to the one to read first."""
        firsts = np.flatnonzero(np.diff(held // self.page, prepend=-1))
        keys = head.k[held].astype(np.float64)
        low = np.minimum.reduceat(keys, firsts)
        high = np.maximum.reduceat(keys, firsts)
        queries = head.q[row].astype(np.float64)
        scores = np.maximum(queries, 0) @ high.T + np.minimum(queries, 0) @ low.T
        of_page = scores.sum(axis=0)
        page = np.repeat(np.arange(len(firsts)), np.diff(firsts, append=len(held)))
        # Pages of equal scores one after the other, the younger first.
        rank = np.empty(len(firsts), np.int64)
        rank[np.argsort(of_page, kind="stable")] = np.arange(len(firsts))
        return np.lexsort((held, rank[page]))
