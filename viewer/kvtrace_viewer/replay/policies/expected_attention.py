"""The attention that future queries are expected to pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.signals import rotate

Doubles = NDArray[np.float64]


class QueryStatistics:
    """Sums over the prompt's queries after the sinks, as far as they have come.

    Attributes
    ----------
    tokens : int
        Queries from `first` that are counted.
    sums : float64 [query head, head_dim]
    products : float64 [query head, head_dim, head_dim]
    """

    def __init__(self, queries: NDArray[np.float32], first: int) -> None:
        self._queries = queries
        self.first, self.tokens = first, 0
        group, size = queries.shape[1:]
        self.sums, self.products = np.zeros((group, size)), np.zeros((group, size, size))

    def moments(self, last: int) -> tuple[Doubles, Doubles]:
        """Mean [query head, head_dim] and covariance of the queries up to `last`."""
        new = self._queries[self.first + self.tokens : max(last, self.first + 1)]
        if len(new):
            queries = new.astype(np.float64).transpose(1, 0, 2)
            self.sums += queries.sum(axis=1)
            self.products += queries.transpose(0, 2, 1) @ queries
            self.tokens += len(new)
        mean = self.sums / self.tokens
        return mean, self.products / self.tokens - mean[:, :, None] * mean[:, None]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Keep the tokens that queries to come, guessed from those of the prompt, would attend to.

    Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution", arXiv:2510.00636. Queries before RoPE are taken as normal, with
    the mean and covariance of the prompt's after the sinks; both are rotated by the mean rotation
    of the next `future` positions, to mu and C. A key scores softmax(k mu / sqrt(d) + k' C k / 2d)
    over the keys after the sinks, mean over the group's query heads, times the norm of its value.
    Deviation: 1 / sqrt(d) is the model's own scale. The first tokens stay.

    Signals: q_prerope, k, v.
    """

    name: ClassVar[str] = "expected_attention"
    signals: ClassVar[frozenset[str]] = frozenset({"q", "q_prerope", "k", "v"})
    default_when: ClassVar[str] = "prefill"

    sinks: int = parameter(4, "first tokens, never evicted and not counted", "tokens", 0)
    future: int = parameter(512, "positions that queries are expected at", "tokens", 1)

    def start(self, head: Head, cuts: Cuts) -> QueryStatistics:
        """Return the statistics of the prompt's queries: none yet."""
        if head.q_prerope is None:
            raise ValueError("q_prerope is declared; the engine checks that it can be had")
        return QueryStatistics(head.q_prerope, min(self.sinks, max(head.prompt_tokens - 1, 0)))

    def scores(self, block: Block, cuts: Cuts, state: QueryStatistics) -> Doubles:
        """Return the expected attention; the sinks, which stay, get none."""
        out = np.zeros((len(cuts.rows), block.stop))
        for c, row in enumerate(cuts.rows):
            if row + 1 > self.sinks:
                out[c, self.sinks : row + 1] = self._expected(block.head, int(row), state)
        return out

    def _expected(self, head: Head, row: int, state: QueryStatistics) -> Doubles:
        """[key from the sinks to `row`]."""
        if head.inv_freq is None or head.v is None:
            raise ValueError("q_prerope and v are declared; the engine checks that they are there")
        ahead = np.arange(row + 1, row + 1 + self.future)
        size = head.k.shape[1]
        # The mean of the rotations is itself a matrix: what it makes of the unit vectors.
        unit = np.broadcast_to(np.eye(size), (len(ahead), size, size))
        turn = rotate(unit, ahead, head.inv_freq).mean(axis=0)
        # A cut inside the prompt does not know the rest of it.
        mean, covariance = state.moments(min(head.prompt_tokens, row + 1))
        mean = mean @ turn
        covariance = turn.T @ covariance @ turn
        keys = head.k[self.sinks : row + 1].astype(np.float64)
        scores = mean @ keys.T * head.scale
        scores += ((keys @ covariance) * keys).sum(axis=2) * (head.scale**2 / 2)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
        norms = np.linalg.norm(head.v[self.sinks : row + 1].astype(np.float64), axis=1)
        return np.asarray(shares * norms)
