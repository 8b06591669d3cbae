"""Observed attention, per query that could see the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(Policy):
    """Keep the tokens with most attention per query that sees them.

    kvpress (NVIDIA, ObservedAttentionPress): accumulated attention as in H2O, divided by the
    number of queries that see the key, mean over the query heads of the group.
    """

    name: ClassVar[str] = "observed_attention"
    takes_received: ClassVar[bool] = True
    default_when: ClassVar[str] = "prefill"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[token]: attention received."""
        return head.received_in_prompt.copy()

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean attention over the queries that see a key."""
        sums = block.newly_received.cumsum(axis=0)
        sums += state[: block.stop]
        state[: block.stop] = sums[-1]
        queries = cuts.rows[:, None] + 1 - np.arange(block.stop)
        queries = np.clip(queries, 1, block.head.window or block.head.tokens)
        mean: NDArray[np.float64] = sums[cuts.rows - block.start] / (queries * block.head.group)
        return mean
