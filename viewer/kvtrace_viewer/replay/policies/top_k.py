"""The most that reading so few tokens can find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.selector import Selector

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TopK(Selector):
    """Read, for every query, the tokens it attends to most: the bound of all that choose per query.

    No running cache knows that before it has read all keys. The query heads of a group read the
    same tokens, those with most attention of all of them in sum; of equal ones the youngest.
    Whatever else reads as many tokens a query in every KV head (quest, rocketkv, recent_n) finds
    at most as much attention: what it lacks is the policy's loss, the rest the budget's. Ours.

    Signals: q, k.
    """

    name: ClassVar[str] = "top_k"

    @property
    def prompt_queries(self) -> int:
        """None: a query chooses for itself."""
        return 0

    def select(
        self, block: Block, rows: Longs, limits: Longs, cache: Cache, state: Any
    ) -> NDArray[np.bool_]:
        """Choose by the row itself."""
        chosen = np.zeros((limits.shape[1], len(rows), block.stop), dtype=np.bool_)
        for r, row in enumerate(rows):
            # Nothing is evicted but what the model itself drops: all budgets hold the same.
            held = np.flatnonzero(cache.holds(int(row))[0, :row])
            attended = block.received[row - block.start, held]
            order = held[np.argsort(attended, kind="stable")[::-1]]
            for b, limit in enumerate(limits[r]):
                chosen[b, r, order[:limit]] = True
        return chosen
