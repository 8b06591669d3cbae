"""Leverage of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter


@dataclass(frozen=True, kw_only=True)
class CUR(Policy):
    """Keep the tokens whose key and value carry most of their neighbourhood's energy.

    Sengupta et al. 2025, "CurDKV: Value-Guided KV Compression for LLMs via Approximated CUR
    Decomposition", arXiv:2509.15038, in the deterministic form of kvpress: |k|^2 and |v|^2, each
    over its sum in windows of `window` tokens, multiplied. The first tokens stay.
    """

    name: ClassVar[str] = "cur"
    signals: ClassVar[frozenset[str]] = frozenset({"k", "v"})
    default_when: ClassVar[str] = "prefill"

    sinks: int = parameter(4, "first tokens that are never evicted", "tokens", 0)
    window: int = parameter(16, "tokens that are normalised together", "tokens", 1)

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        """[2, token]: |k|^2 and |v|^2."""
        if head.v is None:
            raise ValueError("cur declares v; the engine checks that the trace has it")
        return np.stack([(x.astype(np.float64) ** 2).sum(axis=1) for x in (head.k, head.v)])

    def scores(self, block: Block, cuts: Cuts, state: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shares of the window's energy, over the tokens present."""
        out = np.zeros((len(cuts.rows), block.stop))
        for c, row in enumerate(cuts.rows):
            energy = state[:, : row + 1]
            sums = np.add.reduceat(energy, np.arange(0, row + 1, self.window), axis=1)
            sums = np.repeat(sums, self.window, axis=1)[:, : row + 1]
            out[c, : row + 1] = (energy / np.maximum(sums, 1e-300)).prod(axis=0)
        return out
