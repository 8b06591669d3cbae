"""Least frequently needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class LFU(Policy):
    """Evict the token with the fewest uses; a use is a query that needs it.

    The classic of operating systems, with being needed (attention of at least the uniform share
    1/(i+1)) in the place of an access. Each query head of the group counts.
    """

    name: ClassVar[str] = "lfu"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[token]: uses."""
        return np.zeros(head.tokens)

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Uses so far."""
        out = np.empty((len(cuts.rows), block.stop))
        needed = block.needed
        group = block.head.group
        c = 0
        for r in range(block.stop - block.start):
            keys = needed.keys[needed.starts[r * group] : needed.starts[(r + 1) * group]]
            np.add.at(state, keys, 1)
            if c < len(cuts.rows) and cuts.rows[c] == block.start + r:
                out[c] = state[: block.stop]
                c += 1
        return out
