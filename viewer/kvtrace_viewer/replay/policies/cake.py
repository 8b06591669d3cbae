"""Slices of the cache by how layers attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts, present
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.windows import voting_rows, window_sums

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CAKE(Policy):
    """Give layers budgets by the spread and the change of their attention.

    Qin et al. 2025, "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
    arXiv:2503.12491. Over the last `window` queries, a layer's preference is
    entropy^(1/tau_space) * variance^(1/tau_time), the entropy of the rows and the variance of
    each key over the rows, summed over keys, mean over query heads; the total budget is divided
    by it. Within a layer, mean + gamma * variance of a key over the window is ranked, mean over
    the group's query heads; the window stays. Deviations: the shares are those at the first cut;
    the cascade, which ends at the same shares, is not imitated; no layer gets less than one
    token, or more than there is.

    Signals: q, k.
    """

    name: ClassVar[str] = "cake"
    default_when: ClassVar[str] = "prefill"
    surveys: ClassVar[bool] = True

    window: int = parameter(32, "last queries that vote; their tokens stay", "tokens", 1)
    gamma: float = parameter(200.0, "weight of the variance in a key's score", "ratio", 0)
    tau_space: float = parameter(1.0, "temperature of the entropy", "ratio", 0.01)
    tau_time: float = parameter(1.0, "temperature of the variance", "ratio", 0.01)

    @property
    def least_recent(self) -> int:
        """The window."""
        return self.window

    @property
    def prompt_queries(self) -> int:
        """The window."""
        return self.window

    def survey(self, heads: Sequence[Head], cuts: Longs) -> tuple[float, int | None]:
        """Return a layer's preference, and its sliding window."""
        return self._preference(heads, cuts), heads[0].window

    def _preference(self, heads: Sequence[Head], cuts: Longs) -> float:
        if not len(cuts):
            return 1.0
        row = int(cuts[0])
        rows = [h.attention(max(row + 1 - self.window, 0), row + 1) for h in heads]
        attention = np.concatenate(rows).astype(np.float64)  # [query head, row, key]
        logs = np.log(np.where(attention > 0, attention, 1))
        entropy = -(attention * logs).sum(axis=(1, 2)).mean()
        variance = attention.var(axis=1).sum(axis=1).mean()
        return float(entropy ** (1 / self.tau_space) * variance ** (1 / self.tau_time))

    def limits(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """Return the layer's share of all layers' budgets."""
        layers = head.surveys.get(self.spec, {head.layer: (1.0, head.window)})
        preferences = np.array([preference for preference, _ in layers.values()])
        of_layers = [budget.limits(present(rows, window)) for _, window in layers.values()]
        whole = np.sum(of_layers, axis=0)
        total = preferences.sum()
        shares = preferences / total if total > 0 else np.full(len(layers), 1 / len(layers))
        limits = np.floor(np.multiply.outer(whole, shares))
        # A token for every layer comes first, so that the sum is the whole's also where some
        # shares are less than one.
        few = (limits < 1).any(axis=1)
        limits[few] = 1 + np.floor(np.multiply.outer(whole[few] - len(layers), shares))
        own = limits[:, list(layers).index(head.layer)]
        return np.asarray(np.minimum(own, present(rows, head.window)), np.int64)

    def scores(self, block: Block, cuts: Cuts, state: Any) -> Doubles:
        """Mean and variance over the window, which gets none itself: it stays anyway."""
        out = np.zeros((len(cuts.rows), block.stop))
        voting = cuts.rows[cuts.rows >= self.window]
        if not len(voting):
            return out
        rows, first = voting_rows(block, int(voting[0]), self.window)
        shown = rows[:, : voting[-1] + 1 - first].astype(np.float64)
        at = voting + 1 - self.window - first
        mean = window_sums(shown, self.window)[:, at] / self.window
        squares = window_sums(shown * shown, self.window)[:, at] / self.window
        variance = np.maximum(squares - mean * mean, 0)
        scores = (mean + self.gamma * variance).mean(axis=0)
        voted = np.arange(block.stop) < (voting + 1 - self.window)[:, None]
        out[len(cuts.rows) - len(voting) :] = np.where(voted, scores, 0)
        return out
