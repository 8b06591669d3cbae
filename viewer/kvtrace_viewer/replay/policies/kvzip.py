"""What the context needs to be said again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.policies.adakv import compete
from kvtrace_viewer.replay.policies.recorded import Recorded


@dataclass(frozen=True, kw_only=True)
class KVzip(Recorded):
    """Keep, over the heads of a layer, what the model attends to when it repeats its context.

    Kim et al. 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    arXiv:2505.23416. The score is the highest attention that a key receives while the model is
    made to repeat the context: another pass, so it must have been recorded (array `score`).
    Deviation: the budget is divided over the heads of each layer, where the paper ranks the heads
    of all layers together.

    Signals: score.
    """

    name: ClassVar[str] = "kvzip"
    shares_heads: ClassVar[bool] = True

    def allocate(
        self, scores: list[NDArray[np.float64]], limits: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Rank the tokens of all heads together."""
        return compete(scores, limits, 0.0)
