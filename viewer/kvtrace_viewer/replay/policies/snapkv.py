"""What the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter


@dataclass(frozen=True)
class Votes:
    """Rows [query head, key] of the current window, oldest first, and all decision rows."""

    cuts: NDArray[np.int64]
    rows: list[NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep what the last queries attend to, with its neighbours, and the last tokens.

    Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation",
    arXiv:2404.14469. Attention of the last `window` queries on the keys before them: mean over
    the window, pooled along the keys, mean over the query heads of the group; the window itself
    stays. Deviation: the paper sums over the window, which ranks the same.
    """

    name: ClassVar[str] = "snapkv"
    default_when: ClassVar[str] = "prefill"

    window: int = parameter(64, "last queries that vote; their tokens stay", "tokens", 1)
    kernel: int = parameter(5, "width of the pooling along the keys (odd)", "tokens", 1)
    pool: str = parameter("avg", "how votes are pooled: avg or max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("avg", "max"):
            raise InputError(f"pool of {self.name} is {self.pool!r}; expected avg or max; use one")
        if self.kernel % 2 == 0:
            raise InputError(
                f"kernel of {self.name} is {self.kernel}; expected an odd number; "
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

    def start(self, head: Head, cuts: Cuts) -> Votes:
        """Return the rows that vote."""
        return Votes(cuts.rows, [])

    def scores(self, block: Block, cuts: Cuts, state: Votes) -> NDArray[np.float64]:
        """Pooled votes; the window's own tokens, which stay anyway, get none."""
        out = np.zeros((len(cuts.rows), block.stop))
        for row in range(block.start, block.stop):
            after = np.searchsorted(state.cuts, row)
            if after == len(state.cuts) or state.cuts[after] >= row + self.window:
                continue  # no decision's window reaches this row
            state.rows.append(block.attention[:, row - block.start, : row + 1].copy())
            del state.rows[: -self.window]
            voted = row + 1 - self.window
            if state.cuts[after] == row and voted > 0:
                out[np.searchsorted(cuts.rows, row), :voted] = self._votes(state.rows, voted)
        return out

    def _votes(self, rows: list[NDArray[np.float32]], keys: int) -> NDArray[np.float64]:
        mean = np.mean([row[:, :keys] for row in rows], axis=0, dtype=np.float64)
        half = self.kernel // 2
        lowest = 0.0 if self.pool == "avg" else -np.inf
        padded = np.pad(mean, ((0, 0), (half, half)), constant_values=lowest)
        near = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=1)
        pooled = near.mean(axis=2) if self.pool == "avg" else near.max(axis=2)
        return np.asarray(pooled.mean(axis=0))
