"""More for the lower layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.policies.snapkv import SnapKV
from kvtrace_viewer.replay.policy import parameter


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Score as snapkv, with budgets that fall linearly from the first layer to the last.

    Cai et al. 2024, "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling", arXiv:2406.02069. Layer budgets run from 2B - B/beta down to B/beta, with mean
    B. All layers get B where B/beta is less than the window or the first layer's share more
    than there is.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: float = parameter(20.0, "B over the last layer's budget", "ratio", 1)

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """Return the layer's share."""
        there = present(rows, head.window)
        mean = budget.limits(there)
        if head.num_layers < 2:
            return mean
        least = mean / self.beta
        most = 2 * mean - least
        share = np.rint(most - head.layer * (most - least) / (head.num_layers - 1))
        flat = (least < self.window) | (most > there)
        return np.where(flat, mean, share).astype(np.int64)
