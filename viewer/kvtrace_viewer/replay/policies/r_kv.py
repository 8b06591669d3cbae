"""Importance less redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.policy import Policy, parameter

TENTH = parse_amount("10%", "spared", "spared=10%")
COLUMNS = 512  # keys compared with all others at a time: memory is held x 512, never held x held

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """Keep tokens that the last queries attend to and whose keys are unlike other keys.

    Cai et al. 2025, "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
    arXiv:2505.24133. Importance: attention of the last `window` queries over what is held, the
    highest of the group's query heads, mean over the queries, the highest of `kernel` neighbours.
    Redundancy: softmax of the mean cosine of a key to the other keys, where, of the keys that are
    more similar to a key than `threshold`, the `spared` most recent count 0. Kept is the highest
    weight * importance - (1 - weight) * redundancy. Deviation: `weight` is the paper's lambda.

    Signals: q, k.
    """

    name: ClassVar[str] = "r_kv"
    default_when: ClassVar[str] = "every=128"
    needs_held: ClassVar[bool] = True

    weight: float = parameter(0.07, "lambda: importance against redundancy, 0 to 1", "share", 0)
    window: int = parameter(8, "last queries that vote; their tokens stay", "tokens", 1)
    kernel: int = parameter(7, "width of the pooling along what is held (odd)", "tokens", 1)
    threshold: float = parameter(0.5, "cosine above which keys are similar", "cosine", -1)
    spared: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        TENTH, "most recent similar keys that are not redundant", "tokens or % of held"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight > 1:
            raise InputError(f"weight of r_kv is {self.weight}; expected 0 to 1; write weight=0.07")
        if self.kernel % 2 == 0:
            raise InputError(
                f"kernel of r_kv is {self.kernel}; expected an odd number; "
                f"write kernel={self.kernel + 1}"
            )

    @property
    def least_recent(self) -> int:
        """The window."""
        return self.window

    @property
    def prompt_queries(self) -> int:
        """The window."""
        return self.window

    def score_held(self, held: Longs, limit: int, row: int, block: Block, state: Any) -> Doubles:
        """Importance less redundancy."""
        importance = self._importance(block.head, held, row)
        redundancy = self._redundancy(block.head.k[held])
        return self.weight * importance - (1 - self.weight) * redundancy

    def _importance(self, head: Head, held: Longs, row: int) -> Doubles:
        first = max(row + 1 - self.window, 0)
        rows = head.attention(first, row + 1)[:, :, held].astype(np.float64)
        totals = rows.sum(axis=2, keepdims=True)
        mean = (rows / np.where(totals > 0, totals, 1)).max(axis=0).mean(axis=0)
        half = self.kernel // 2
        padded = np.pad(mean, half, constant_values=0.0)
        near = np.lib.stride_tricks.sliding_window_view(padded, self.kernel)
        return np.asarray(near.max(axis=1))

    def _redundancy(self, keys: NDArray[np.float32]) -> Doubles:
        wide = keys.astype(np.float64)
        unit = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
        spared = max(int(self.spared.of(np.array([len(keys)]))[0]), 1)
        sums = np.zeros(len(keys))
        for start in range(0, len(keys), COLUMNS):
            columns = np.arange(start, min(start + COLUMNS, len(keys)))
            cosine = unit @ unit[columns].T
            cosine[columns, columns - start] = 0
            similar = cosine > self.threshold
            newer = similar[::-1].cumsum(axis=0)[::-1]  # itself and those after it
            cosine[similar & (newer <= spared)] = 0
            sums += cosine.sum(axis=1)
        mean = sums / len(keys)
        shares = np.exp(mean - mean.max())
        return np.asarray(shares / shares.sum())
