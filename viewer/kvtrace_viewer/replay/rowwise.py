"""Policies whose memory depends on what was held when each row came."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.policy import Policy

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowByRow(Policy):
    """A policy that sees every row as a real run would: over what is held.

    Each budget has a memory of its own from the first cut on; before it all see the same.
    """

    @abstractmethod
    def memory(self, head: Head) -> Any:
        """Return the memory of one cache before its first row."""

    @abstractmethod
    def see_row(self, block: Block, row: int, held: Longs, memory: Any) -> None:
        """Update a memory with the query of `row`, which reads `held` (its own token too)."""

    @abstractmethod
    def score_row(self, held: Longs, row: int, memory: Any) -> Doubles:
        """Score what is held after `row`. Higher = kept."""

    def left(self, held: int, limit: int, is_first: bool) -> int:
        """Tokens that a cut leaves of more than `limit`; the protected ones stay in any case."""
        return limit

    def start(self, head: Head, cuts: Cuts) -> list[Any]:
        """Return the memory that all budgets share."""
        return [self.memory(head)]

    def decide(self, block: Block, cuts: Cuts, state: list[Any], cache: Cache) -> None:
        """See each row, and cut where it is due."""
        for row in range(block.start, block.stop):
            for b, memory in enumerate(state):
                visible = np.append(cache.held_before(row - 1, b), row)
                self.see_row(block, row, visible, memory)
            now = cuts.within(row, row + 1)
            if len(now.rows):
                self._cut(now, state, cache)

    def _cut(self, now: Cuts, state: list[Any], cache: Cache) -> None:
        row, budgets = int(now.rows[0]), len(cache.counts)
        is_first = not cache.joined
        lines = np.zeros((budgets, 1, row + 1))
        limits = now.limits.copy()
        for b, limit in enumerate(now.limits[0]):
            held = cache.held_before(row, b)
            if len(held) > limit:
                left = self.left(len(held), int(limit), is_first)
                # A block that is dropped is of what is not protected.
                limits[0, b] = max(left, now.sinks[0, b] + now.recent[0, b])
                lines[b, 0, held] = self.score_row(held, row, state[min(b, len(state) - 1)])
        state += [deepcopy(state[0]) for _ in range(budgets - len(state))]
        cache.cut(replace(now, limits=limits), lines)
