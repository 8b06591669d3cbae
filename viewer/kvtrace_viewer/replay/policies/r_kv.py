"""Importance less redundancy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Amount, parse_amount
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.jit import jit
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.windows import voting_rows

TENTH = parse_amount("10%", "spared", "spared=10%")
COLUMNS = 512  # keys compared with all others at a time: memory is held x 512, never held x held

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass
class Seen:
    """What all budgets share.

    Attributes
    ----------
    directions : float64 [token, head_dim], keys of norm 1
    rows : float32 [query head, row, key], rows that vote in a block, from `first` on
    redundancy : by the bytes of what is held, the last one computed
    """

    directions: Doubles
    rows: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0, 0), np.float32))
    first: int = 0
    redundancy: dict[bytes, Doubles] = field(default_factory=dict)


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

    def start(self, head: Head, cuts: Cuts) -> Seen:
        """Return the keys' directions."""
        keys = head.k.astype(np.float64)
        return Seen(keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12))

    def see(self, block: Block, cuts: Cuts, state: Seen) -> None:
        """Compute the rows that vote at some decision of the block."""
        state.redundancy = {}
        if len(cuts.rows):
            state.rows, state.first = voting_rows(block, int(cuts.rows[0]), self.window)

    def score_held(self, held: Longs, limit: int, row: int, block: Block, state: Seen) -> Doubles:
        """Importance less redundancy."""
        importance = self._importance(state, held, row)
        alike = held.tobytes()  # budgets that hold the same, as all do at first
        if alike not in state.redundancy:
            state.redundancy = {alike: self._redundancy(state.directions[held])}
        return self.weight * importance - (1 - self.weight) * state.redundancy[alike]

    def _importance(self, state: Seen, held: Longs, row: int) -> Doubles:
        first, last = max(row + 1 - self.window, 0) - state.first, row + 1 - state.first
        return _pooled_votes(state.rows[:, first:last], held, self.kernel // 2)

    def _redundancy(self, directions: Doubles) -> Doubles:
        count = len(directions)
        spared = max(int(self.spared.of(np.array([count]))[0]), 1)
        sums = np.zeros(count)
        for start in range(0, count, COLUMNS):
            cosine = directions[start : start + COLUMNS] @ directions.T
            _add_cosines(cosine, start, self.threshold, spared, sums)
        mean = sums / count
        shares = np.exp(mean - mean.max())
        return np.asarray(shares / shares.sum())


@jit
def _pooled_votes(rows: NDArray[np.float32], held: Longs, half: int) -> Doubles:
    """Return [held]: each row's shares of what is held, highest head, mean, highest neighbour."""
    group, count, _ = rows.shape
    votes, highest = np.zeros(held.shape[0]), np.empty(held.shape[0])
    for r in range(count):
        highest[:] = 0
        for g in range(group):
            total = 0.0
            for j in held:
                total += rows[g, r, j]
            whole = total if total > 0 else 1.0
            for s in range(held.shape[0]):
                highest[s] = max(highest[s], rows[g, r, held[s]] / whole)
        votes += highest
    votes /= count
    pooled = votes.copy()
    for s in range(held.shape[0]):
        for near in range(max(s - half, 0), min(s + half + 1, held.shape[0])):
            pooled[s] = max(pooled[s], votes[near])
    return pooled


@jit
def _add_cosines(cosine: Doubles, start: int, threshold: float, spared: int, sums: Doubles) -> None:
    """Add to sums [key] the cosines to keys start, start + 1, ...: cosine [column, key].

    Of the keys that are similar to a column, the `spared` most recent count 0, and so does it.
    """
    for c in range(cosine.shape[0]):
        line = cosine[c]
        line[start + c] = 0
        recent = 0
        for i in range(line.shape[0] - 1, -1, -1):
            if line[i] > threshold:
                line[i] = 0
                recent += 1
                if recent == spared:
                    break
        for i in range(line.shape[0]):
            sums[i] += line[i]
