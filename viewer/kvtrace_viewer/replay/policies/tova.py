"""Token omission via attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Evict the token that the last query attends to least, over all heads of the layer.

    Oren et al. 2024, "Transformers are Multi-State RNNs", arXiv:2401.06104. Attention of the
    last row, renormalised over what is held as a real run would see it, averaged over all query
    heads of the layer; the last token itself stays.
    """

    name: ClassVar[str] = "tova"
    across_heads: ClassVar[bool] = True
    needs_held: ClassVar[bool] = True

    @property
    def least_recent(self) -> int:
        """The last token."""
        return 1

    @property
    def prompt_queries(self) -> int:
        """The last, for a cut right after the prompt."""
        return 1

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Attention of the row, summed over the heads: ranked as its mean is."""
        total = np.zeros(len(held))
        r = row - block.start
        for head in block.layer:
            _add_renormalised(head.attention, r, head.sink_share, held, total)
        return total


@jit
def _add_renormalised(
    attention: NDArray[np.float32],
    r: int,
    sink_share: NDArray[np.float64],
    held: NDArray[np.int64],
    total: NDArray[np.float64],
) -> None:
    for g in range(attention.shape[0]):
        row = attention[g, r]
        mass = 0.0
        for j in held:
            mass += row[j]
        if mass > 0:
            share = 1.0 / (mass + sink_share[g, r])
            for s in range(len(held)):
                total[s] += row[held[s]] * share
