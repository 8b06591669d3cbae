"""LFU as vLLM's CachePolicy: evict the block used least often, of several the oldest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class LFUPolicy(OrderedPolicy):
    """Least frequently used first out; a block that comes back begins to count anew."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.uses: dict[Any, int] = {}
        self.by_uses: dict[int, OrderedDict[Any, None]] = {}

    def joined(self, key: Any) -> None:
        """Used once."""
        self._count(key, 1)

    def used(self, key: Any) -> None:
        """Used once more."""
        uses = self.uses[key]
        self._forget(key)
        self._count(key, uses + 1)

    def left(self, key: Any, *, evicted: bool) -> None:
        """Forget the uses."""
        self._forget(key)

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """The first of the least used that may go."""
        return next(
            key for uses in sorted(self.by_uses) for key in self.by_uses[uses] if evictable(key)
        )

    def _count(self, key: Any, uses: int) -> None:
        self.uses[key] = uses
        self.by_uses.setdefault(uses, OrderedDict())[key] = None

    def _forget(self, key: Any) -> None:
        uses = self.uses.pop(key)
        del self.by_uses[uses][key]
        if not self.by_uses[uses]:
            del self.by_uses[uses]
