"""Token omission via attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
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

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Mean attention of the row."""
        total = np.zeros(len(held))
        for head in block.layer:
            kept = head.attention[:, row - block.start][:, held].astype(np.float64)
            sums = kept.sum(axis=1) + head.sink_share[:, row - block.start]
            total += (kept / np.where(sums > 0, sums, 1.0)[:, None]).sum(axis=0)
        return np.asarray(total / sum(head.head.group for head in block.layer))
