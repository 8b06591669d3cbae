"""Least frequently needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class LFU(Policy):
    """Evict the token with the fewest uses; a use is a query that needs it.

    The classic of operating systems, with being needed (attention of at least the uniform share
    1/(i+1)) in the place of an access. Each query head of the group counts.
    """

    name: ClassVar[str] = "lfu"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float32]:
        """[token]: uses."""
        return np.zeros(head.tokens, dtype=np.float32)

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Uses so far: whole numbers, exact up to 2^24."""
        out = np.empty((len(cuts.rows), block.stop), dtype=np.float32)
        needed = block.needed
        _count_uses(
            needed.starts, needed.keys, block.head.group, block.start, cuts.rows, state, out
        )
        return out


@jit
def _count_uses(
    starts: NDArray[np.int64],
    keys: NDArray[np.int32],
    group: int,
    start: int,
    cuts: NDArray[np.int64],
    uses: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    rows = (len(starts) - 1) // group
    c = 0
    for r in range(rows):
        for at in range(starts[r * group], starts[(r + 1) * group]):
            uses[keys[at]] += np.float32(1)
        if c < len(cuts) and cuts[c] == start + r:
            out[c] = uses[: out.shape[1]]
            c += 1
