"""Once by snapkv, then by pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts, present
from kvtrace_viewer.replay.policies.quest import Quest
from kvtrace_viewer.replay.policies.snapkv import SnapKV
from kvtrace_viewer.replay.policy import Policy, parameter

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RocketKV(SnapKV, Quest):
    """Evict once as snapkv does, then read pages of what is left as quest does.

    Behnam et al. 2025, "RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache
    Compression", arXiv:2502.14051. The compression is split evenly: of n tokens, sqrt(B n) are
    stored and B are read. Deviations: the second stage ranks pages by all channels of the query
    (the paper by its largest); pooling is snapkv's.

    Signals: q, k.
    """

    name: ClassVar[str] = "rocketkv"
    default_when: ClassVar[str] = "prefill"

    window: int = parameter(32, "last queries that vote; their tokens stay", "tokens", 1)
    kernel: int = parameter(63, "width of the pooling along the keys (odd)", "tokens", 1)

    def limits(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """Tokens stored."""
        there = present(rows, head.window)
        stored = np.sqrt(budget.limits(there) * there)
        return np.asarray(np.maximum(stored, 1), dtype=np.int64)

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Evict as snapkv does."""
        Policy.decide(self, block, cuts, state, cache)
