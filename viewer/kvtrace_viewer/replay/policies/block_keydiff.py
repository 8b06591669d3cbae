"""keydiff, a block at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.policies.keydiff import KeyDiff
from kvtrace_viewer.replay.policy import parameter


@dataclass(frozen=True, kw_only=True)
class BlockKeyDiff(KeyDiff):
    """Cut as keydiff does, with the tokens beyond the budget coming in a block at a time.

    Park et al. 2025, arXiv:2504.15364, in the block-iterative form of kvpress: the first B
    tokens are held; each block of the next ones joins, and the B best of both stay. Equal
    scores drop the older; ties inside the iteration are not counted.
    """

    name: ClassVar[str] = "block_keydiff"

    block: int = parameter(128, "tokens that join before each cut", "tokens", 1)

    def score_held(
        self,
        held: NDArray[np.int64],
        limit: int,
        row: int,
        block: Block,
        state: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """1 for the tokens that stay to the end, 0 for the others."""
        kept = held[:limit]
        for at in range(limit, len(held), self.block):
            candidates = np.concatenate([kept, held[at : at + self.block]])
            scores = super().score_held(candidates, limit, row, block, state)
            order = np.argsort(scores, kind="stable")
            kept = np.sort(candidates[order[-limit:]])
        return np.isin(held, kept).astype(np.float64)
