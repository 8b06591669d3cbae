"""Budgets by how much a head retrieves."""

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
from kvtrace_viewer.replay.table import entry


@dataclass(frozen=True, kw_only=True)
class HeadKV(SnapKV):
    """Score as snapkv, with a budget per head from a table of the heads' importance.

    Fu et al. 2024, "Not All Heads Matter: A Head-Level KV Cache Compression Method with
    Integrated Retrieval and Reasoning", arXiv:2410.19258. Every head gives B / beta of its budget
    to a pool that is divided by importance over all heads of all layers. Deviations: budgets are
    rounded down, and what a head has beyond the tokens there are is not handed on. The table is
    measured on the model beforehand, as the paper says; without one all heads weigh the same.

    Signals: q, k, and the table.
    """

    name: ClassVar[str] = "headkv"

    table: str = parameter("", "file of importances: JSON, [layer][kv head], 0 or more", "file")
    beta: float = parameter(1.2, "B over what a head gives to the pool", "ratio", 1)

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """Return the head's share."""
        there = present(rows, head.window)
        mean = budget.limits(there)
        if not self.table:
            return mean
        table, own = entry(self.name, self.table, head.layer, head.kv_head)
        total = table.sum()
        parts = table / total if total > 0 else np.full(table.shape, 1 / table.size)
        part = own / total if total > 0 else 1 / table.size
        pool = mean / self.beta * table.size
        # Where some head's share is below a token, all have one before the rest is divided.
        few = mean - mean / self.beta + pool * parts.min() < 1
        pool = np.where(few, (mean - 1) / self.beta * table.size, pool)
        share = np.where(few, 1 + (mean - 1) * (1 - 1 / self.beta), mean - mean / self.beta)
        # A share of whole tokens may be a rounding below itself.
        return np.minimum(np.floor(share + pool * part + 1e-9), there).astype(np.int64)
