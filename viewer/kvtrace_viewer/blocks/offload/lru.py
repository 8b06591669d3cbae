"""LRU as vLLM's CachePolicy: evict the block whose last use is longest ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class LRUPolicy(OrderedPolicy):
    """Least recently used first out."""

    def used(self, key: Any) -> None:
        """Move to the end."""
        self.blocks.move_to_end(key)

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """The first that may go."""
        return next(filter(evictable, self.blocks))
