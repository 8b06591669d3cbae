"""What the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import Policy, parameter


class Votes:
    """What the last `window` rows sum to, without ever taking a row off again.

    Rows stand in groups of `window`. The last rows are the end of one group and the beginning of
    the next: of the group that is full, the sums from each row to its end are kept; of the one
    that fills, the sum so far. (A difference of sums leaves rounding where nothing is.)

    Attributes
    ----------
    cuts : int64 [cut], all decision rows
    ends : float64 [window, query head, token]: rows of the group that fills up to the current one,
        beyond it the sums from that place to the end of the group before
    sums : float64 [query head, token], rows of the group that fills
    """

    def __init__(self, head: Head, cuts: Cuts, window: int) -> None:
        self.cuts = cuts.rows
        self.ends = np.zeros((window, head.group, head.tokens))
        self.sums = np.zeros((head.group, head.tokens))


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
        """Return the votes of no rows."""
        return Votes(head, cuts, self.window)

    def scores(self, block: Block, cuts: Cuts, state: Votes) -> NDArray[np.float64]:
        """Pooled votes; the window's own tokens, which stay anyway, get none."""
        out = np.zeros((len(cuts.rows), block.stop))
        rows = np.arange(block.start, block.stop)
        after = np.append(state.cuts, np.iinfo(np.int64).max)[np.searchsorted(state.cuts, rows)]
        _vote(
            block.attention,
            block.start,
            after < rows + self.window,  # some decision's window reaches the row
            after == rows,
            state.ends,
            state.sums,
            self.kernel,
            self.pool == "max",
            out,
        )
        return out


@jit
def _vote(
    attention: NDArray[np.float32],
    start: int,
    votes: NDArray[np.bool_],
    is_cut: NDArray[np.bool_],
    ends: NDArray[np.float64],
    sums: NDArray[np.float64],
    kernel: int,
    is_max: bool,
    out: NDArray[np.float64],
) -> None:
    """Add rows to the votes, and write the scores due at each cut."""
    window = ends.shape[0]
    half = kernel // 2
    means = np.full(attention.shape[2] + 2 * half, -np.inf if is_max else 0.0)
    c = 0
    for r in range(attention.shape[1]):
        row = start + r
        at, voted = row % window, row + 1 - window
        for g in range(attention.shape[0]):
            if at == 0:
                sums[g, : row + 1] = 0
                for later in range(window - 2 if votes[r] else -1, -1, -1):
                    _add(ends[later, g, :row], ends[later + 1, g, :row])
            if votes[r]:
                ends[at, g, : row + 1] = attention[g, r, : row + 1]
                _add(sums[g, : row + 1], ends[at, g, : row + 1])
            if is_cut[r] and voted > 0:
                mean = means[half : half + voted]
                mean[:] = sums[g, :voted]
                if at + 1 < window:
                    _add(mean, ends[at + 1, g, :voted])
                mean /= window
                means[half + voted :] = means[0] if half else 0.0
                _pool(means, kernel, is_max, attention.shape[0], out[c, :voted])
        c += is_cut[r]


@jit
def _add(sums: NDArray[np.float64], row: NDArray[np.float64]) -> None:
    for j in range(sums.shape[0]):
        sums[j] += row[j]


@jit
def _pool(
    means: NDArray[np.float64], kernel: int, is_max: bool, group: int, out: NDArray[np.float64]
) -> None:
    """Add to out [key] what a query head's means pool to, its part of the group's mean."""
    pooled = means[: out.shape[0]].copy()
    for k in range(1, kernel):
        near = means[k : k + out.shape[0]]
        if is_max:
            for j in range(out.shape[0]):
                pooled[j] = max(pooled[j], near[j])
        else:
            _add(pooled, near)
    share = group if is_max else group * kernel
    for j in range(out.shape[0]):
        out[j] += pooled[j] / share
