"""Attention output error of dropping a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class CAOTE(Policy):
    """Evict the token whose absence changes the last query's attention output least.

    Goel et al. 2025, "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token
    Eviction", arXiv:2504.14051. Without token j, output o becomes (o - a v) / (1 - a), a change of
    a / (1 - a) * |o - v|, with a over what is held. Deviations: a is the last row's attention (the
    paper also takes it from other policies' scores), and the mean over the group's query heads is
    ranked, which the paper, with a value per query head, leaves open.

    Signals: q, k, v.
    """

    name: ClassVar[str] = "caote"
    signals: ClassVar[frozenset[str]] = frozenset({"q", "k", "v"})
    needs_held: ClassVar[bool] = True

    @property
    def prompt_queries(self) -> int:
        """The last, for a cut right after the prompt."""
        return 1

    def score_held(
        self, held: NDArray[np.int64], limit: int, row: int, block: Block, state: Any
    ) -> NDArray[np.float64]:
        """Change of the output, mean over the group."""
        if block.head.v is None:
            raise ValueError("caote declares v; the engine checks that the trace has it")
        values = block.head.v[held].astype(np.float64)
        r = row - block.start
        changes = np.zeros(len(held))
        for attention, sink in zip(block.attention[:, r], block.sink_share[:, r], strict=True):
            shares = attention[held].astype(np.float64)
            shares /= max(shares.sum() + sink, 1e-300)
            output = shares @ values
            apart = np.linalg.norm(output - values, axis=1)
            changes += shares / np.maximum(1 - shares, 1e-12) * apart
        return changes / block.head.group
