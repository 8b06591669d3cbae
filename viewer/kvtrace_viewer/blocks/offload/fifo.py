"""FIFO as vLLM's CachePolicy: evict the block that came first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class FIFOPolicy(OrderedPolicy):
    """First in, first out."""

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """The first that may go."""
        return next(filter(evictable, self.blocks))
