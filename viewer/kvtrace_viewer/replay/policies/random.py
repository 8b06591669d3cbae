"""Chance: the policy that every other should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Evict tokens drawn at random.

    Every held token is equally likely at every decision. The draws are the same for every
    budget, and for equal seeds.
    """

    name: ClassVar[str] = "random"
    signals: ClassVar[frozenset[str]] = frozenset()

    seed: int = parameter(0, "seed of the draws", "seed", 0)

    def start(self, head: Head, cuts: Cuts) -> np.random.Generator:
        """Return the head's own stream of draws."""
        return np.random.default_rng([self.seed, head.layer, head.kv_head])

    def scores(self, block: Block, cuts: Cuts, state: np.random.Generator) -> NDArray[np.float64]:
        """New draws for every decision."""
        out = np.zeros((len(cuts.rows), block.stop))
        for c, row in enumerate(cuts.rows):
            state.random(out=out[c, : row + 1])
        return out
