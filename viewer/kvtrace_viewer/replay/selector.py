"""What a policy is that evicts nothing and chooses, for every query, what is read."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts, present
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.when import When

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Selector(Policy):
    """Which tokens each query reads, of all that the cache holds.

    A budget limits what is read, not what is stored. A selector that also evicts (rocketkv)
    overrides `limits` and `decide`; it then chooses among what is left.
    """

    selects: ClassVar[bool] = True

    def limits(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """Tokens stored: all that are present."""
        return present(rows, head.window)

    def reads(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """Tokens that the query of each row reads, its own not counted."""
        return budget.limits(present(rows - 1, head.window))

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Evict nothing."""

    @abstractmethod
    def select(
        self, block: Block, rows: Longs, limits: Longs, cache: Cache, state: Any
    ) -> NDArray[np.bool_]:
        """Choose what the queries of some rows read.

        Parameters
        ----------
        rows : int64 [row]
            Positions, ascending, all in the block and after the first cut.
        limits : int64 [row, budget]
            Tokens that may be read; the query's own token is read in any case and not counted.
        cache : Cache
            `cache.holds(row)` [budget, key] is what there is to choose from.

        Returns
        -------
        bool [budget, row, key]
            Key running to block.stop.
        """

    def exactness(self, when: When) -> str:
        """E2s: what is chosen is exact but for the drift of q."""
        return "E2s"
