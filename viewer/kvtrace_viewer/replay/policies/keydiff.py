"""Keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keep the keys least similar to the mean key of what is held.

    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments", arXiv:2504.15364. Minus the cosine between
    a key and the mean of the normalised keys held at the decision, compared in float32: two keys
    are always equally far from their mean, and rounding must not choose.
    """

    name: ClassVar[str] = "keydiff"
    signals: ClassVar[frozenset[str]] = frozenset({"k"})
    default_when: ClassVar[str] = "prefill"
    needs_held: ClassVar[bool] = True

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[token, head_dim]: keys of norm 1."""
        keys = head.k.astype(np.float64)
        return np.asarray(keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12))

    def score_held(
        self,
        held: NDArray[np.int64],
        limit: int,
        row: int,
        block: Block,
        state: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Minus the cosine to the mean."""
        keys = state[held]
        mean = keys.mean(axis=0)
        cosine = keys @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
        return np.asarray(-cosine.astype(np.float32).astype(np.float64))
