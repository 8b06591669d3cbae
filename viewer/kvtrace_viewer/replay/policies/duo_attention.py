"""Retrieval heads and streaming heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import Amount, Budget, parse_amount
from kvtrace_viewer.replay.block import Head
from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow
from kvtrace_viewer.replay.policy import parameter
from kvtrace_viewer.replay.table import entry

RECENT = parse_amount("256", "recent", "recent=256")
HALF = parse_amount("50%", "retrieval", "retrieval=50%")


@dataclass(frozen=True, kw_only=True)
class DuoAttention(SlidingWindow):
    """Streaming heads keep the first and the last tokens, retrieval heads share the rest.

    Xiao et al. 2024, "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
    Streaming Heads", arXiv:2410.10819. The heads of the highest gates in the table are retrieval
    heads. Deviations: in the paper retrieval heads keep everything; here the budget is the mean
    over all heads, and retrieval heads share evenly what streaming heads leave of it, evicting
    the oldest after the sinks where it is not enough. The table is learned beforehand; without
    one all heads are retrieval heads.

    Signals: positions, and the table.
    """

    name: ClassVar[str] = "duo_attention"

    sinks: int = parameter(64, "first tokens that are never evicted", "tokens", 0)
    recent: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        RECENT, "last tokens that are never evicted", "tokens or % of budget"
    )
    table: str = parameter("", "file of gates: JSON, [layer][kv head], 0 or more", "file")
    retrieval: Amount = parameter(  # noqa: RUF009 (a dataclass field; an Amount never changes)
        HALF, "heads that are retrieval heads", "heads or % of all"
    )

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """Sinks and recent tokens for streaming heads, the rest for retrieval heads."""
        there = present(rows, head.window)
        mean = budget.limits(there)
        if not self.table:
            return mean
        table, own = entry(self.name, self.table, head.layer, head.kv_head)
        heads = table.size
        count = min(int(self.retrieval.of(np.array([heads]))[0]), heads)
        streaming = np.minimum(self.sinks + self.recent.of(mean), mean)
        if not count:
            return streaming
        chosen = np.sort(table.ravel())[::-1][count - 1]
        # Heads with the gate of the last one chosen are chosen too: they cannot be told apart.
        count = int((table >= chosen).sum())
        rest = (mean * heads - streaming * (heads - count)) // count
        return np.minimum(rest if own >= chosen else streaming, there)
