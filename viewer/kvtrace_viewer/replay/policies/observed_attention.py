"""Observed attention, per query that could see the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.jit import jit_divide
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
        out = np.zeros((len(cuts.rows), block.stop))
        seen = block.head.window or block.head.tokens
        _means(block.newly_received, block.start, cuts.rows, seen, block.head.group, state, out)
        return out


@jit_divide
def _means(
    received: NDArray[np.float64],
    start: int,
    cuts: NDArray[np.int64],
    window: int,
    group: int,
    sums: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Add rows to `sums` and write what is due at each cut; at most `window` queries see a key."""
    stop = received.shape[1]
    sums = sums[:stop]
    c = 0
    for r in range(received.shape[0]):
        row = received[r]
        for j in range(row.shape[0]):
            sums[j] += row[j]
        if c < len(cuts) and cuts[c] == start + r:
            line = out[c]
            for j in range(start + r + 1):
                line[j] = sums[j] / (min(start + r + 1 - j, window) * group)
            c += 1
