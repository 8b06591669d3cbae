"""A window over the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Policy):
    """Keep the last B tokens.

    Longformer (Beltagy et al. 2020, arXiv:2004.05150) and the rolling buffer of Mistral 7B
    (arXiv:2310.06825).
    """

    name: ClassVar[str] = "sliding_window"
    signals: ClassVar[frozenset[str]] = frozenset()

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Evict the oldest: position is the score."""
        cache.cut_oldest(cuts)
