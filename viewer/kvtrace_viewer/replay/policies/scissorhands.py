"""Persistence of importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import parameter
from kvtrace_viewer.replay.rowwise import RowByRow

TEN = parse_amount("10", "recent", "recent=10")
HALF = parse_amount("50%", "drop", "drop=50%")


@dataclass
class Unimportance:
    """How often each token was unimportant: `counts` [token], the sum of `ring` [row, token]."""

    counts: NDArray[np.int64]
    ring: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scissorhands(RowByRow):
    """Evict, a block at a time, the tokens that got less than the mean attention most often.

    Liu et al. 2023, "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM
    KV Cache Compression at Test Time", arXiv:2305.17118. In the last `history` rows, a token of a
    cache of t is counted where a < 1/t, attention being over what is held; when the cache is over
    its budget, the `drop` most counted go at once. Deviations: the cut that brings the prompt
    down to the budget drops no more than that; query heads of a group each count.

    Signals: q, k.
    """

    name: ClassVar[str] = "scissorhands"

    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        TEN, "last tokens that are never evicted", "tokens or % of budget"
    )
    history: int = parameter(400, "last rows in which tokens are counted", "rows", 1)
    drop: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        HALF, "tokens evicted at once", "tokens or % of budget"
    )

    def memory(self, head: Head) -> Unimportance:
        """Nothing counted."""
        ring = np.zeros((min(self.history, head.tokens), head.tokens), np.uint8)
        return Unimportance(np.zeros(head.tokens, np.int64), ring)

    def see_row(
        self, block: Block, row: int, held: NDArray[np.int64], memory: Unimportance
    ) -> None:
        """Count, and forget what is older than the history."""
        r = row - block.start
        oldest = memory.ring[row % len(memory.ring)]
        _count(block.attention[:, r], block.sink_share[:, r], held, oldest, memory.counts)

    def score_row(
        self, held: NDArray[np.int64], row: int, memory: Unimportance
    ) -> NDArray[np.float64]:
        """Minus the count."""
        return -memory.counts[held].astype(np.float64)

    def left(self, held: int, limit: int, is_first: bool) -> int:
        """`drop` fewer than are held, or the budget."""
        drop = int(self.drop.of(np.array([limit]))[0])
        return limit if is_first else max(1, min(limit, held - drop))


@jit
def _count(
    attention: NDArray[np.float32],
    sink_share: NDArray[np.float64],
    held: NDArray[np.int64],
    oldest: NDArray[np.uint8],
    counts: NDArray[np.int64],
) -> None:
    """Put the row's counts in the place of the oldest row's."""
    for j in range(counts.shape[0]):
        counts[j] -= oldest[j]
        oldest[j] = 0
    for g in range(attention.shape[0]):
        mass = sink_share[g]
        for j in held:
            mass += attention[g, j]
        limit = mass / held.shape[0]
        for j in held:
            below = attention[g, j] < limit
            oldest[j] += below
            counts[j] += below
