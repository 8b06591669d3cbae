"""CLOCK as vLLM's CachePolicy: evict the oldest block that was not used since the hand passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class ClockPolicy(OrderedPolicy):
    """A second chance for blocks that were used (Corbato 1968)."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.marked: set[Any] = set()

    def used(self, key: Any) -> None:
        """Set the block's bit."""
        self.marked.add(key)

    def left(self, key: Any, *, evicted: bool) -> None:
        """Forget its bit."""
        self.marked.discard(key)

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """Go round; what was used, or may not go, is passed over."""
        while True:
            key = next(iter(self.blocks))
            if key not in self.marked and evictable(key):
                return key
            self.marked.discard(key)
            self.blocks.move_to_end(key)
