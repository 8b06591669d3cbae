"""A window over the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Policy):
    """Keep the last B tokens.

    Longformer (Beltagy et al. 2020, arXiv:2004.05150) and the rolling buffer of Mistral 7B
    (arXiv:2310.06825).
    """

    name: ClassVar[str] = "sliding_window"
    signals: ClassVar[frozenset[str]] = frozenset()

    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        """Younger is higher."""
        return np.broadcast_to(np.arange(block.stop, dtype=float), (len(cuts.rows), block.stop))
