"""A score that came with the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Recorded(Policy):
    """Keep the tokens of the highest score that was recorded with the trace.

    For policies whose scores come from another pass over the model or from a learned part. The
    trace's array `score` holds one number per token, layer and KV head, higher = kept; tokens
    without one (NaN) are kept before all others.

    Signals: score.
    """

    name: ClassVar[str] = "recorded"
    signals: ClassVar[frozenset[str]] = frozenset({"score"})
    default_when: ClassVar[str] = "prefill"

    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        """Return the score at every decision."""
        if block.head.score is None:
            raise ValueError("score is declared; the engine checks that the trace has it")
        score = block.head.score[: block.stop].astype(np.float64)
        line = np.where(np.isnan(score), np.inf, score)
        return np.broadcast_to(line, (len(cuts.rows), block.stop))
