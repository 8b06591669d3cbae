"""The last tokens, read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.selector import Selector
from kvtrace_viewer.replay.when import When


@dataclass(frozen=True, kw_only=True)
class RecentN(Selector):
    """Read only the last B tokens; all stay stored.

    Limits what a query reads, not what the cache holds: sliding_window without evictions, with
    its own token beside the B. The first `sinks` tokens, if any, are read too, within B.

    Signals: positions.
    """

    name: ClassVar[str] = "recent_n"
    signals: ClassVar[frozenset[str]] = frozenset()

    def select(
        self,
        block: Block,
        rows: NDArray[np.int64],
        limits: NDArray[np.int64],
        cache: Cache,
        state: Any,
    ) -> NDArray[np.bool_]:
        """Choose by position."""
        keys = np.arange(block.stop)
        first = np.minimum(self.sinks, limits).T[:, :, None]
        last = limits.T[:, :, None] - first
        chosen: NDArray[np.bool_] = (keys < first) | (keys >= rows[:, None] - last)
        return chosen

    def exactness(self, when: When) -> str:
        """E0: position decides."""
        return "E0"
