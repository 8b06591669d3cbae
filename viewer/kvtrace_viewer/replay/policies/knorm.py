"""Small keys matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class KNorm(Policy):
    """Keep the keys of smallest norm.

    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arXiv:2406.11430. Deviation: the paper leaves the first two layers alone. Equal tokens have
    equal key norms in layer 0, so ties are real; norms are compared in float32 for that.
    """

    name: ClassVar[str] = "knorm"
    signals: ClassVar[frozenset[str]] = frozenset({"k"})
    default_when: ClassVar[str] = "prefill"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float32]:
        """[token]: minus the norm."""
        norms = np.linalg.norm(head.k.astype(np.float64), axis=1)
        return np.asarray(-norms.astype(np.float32))

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Smaller is higher."""
        return np.broadcast_to(state[: block.stop], (len(cuts.rows), block.stop))
