"""SIEVE as vLLM's CachePolicy: a hand spares used blocks where they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class SievePolicy(OrderedPolicy):
    """Evict the first block not used since the hand last passed (Zhang et al., NSDI 2024)."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.marked: set[Any] = set()
        #: Neighbours, towards the newest; None is the end on either side.
        self.newer: dict[Any, Any] = {}
        self.older: dict[Any, Any] = {}
        self.oldest: Any = None
        self.newest: Any = None
        self.hand: Any = None

    def joined(self, key: Any) -> None:
        """A new block is the newest."""
        self.older[key], self.newer[key] = self.newest, None
        if self.newest is None:
            self.oldest = key
        else:
            self.newer[self.newest] = key
        self.newest = key

    def used(self, key: Any) -> None:
        """Mark it."""
        self.marked.add(key)

    def left(self, key: Any, *, evicted: bool) -> None:
        """Close the gap; a hand that stood there moves on."""
        older, newer = self.older.pop(key), self.newer.pop(key)
        if older is None:
            self.oldest = newer
        else:
            self.newer[older] = newer
        if newer is None:
            self.newest = older
        else:
            self.older[newer] = older
        if self.hand == key:
            self.hand = newer
        self.marked.discard(key)

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """Move the hand to the next that is not marked and may go."""
        key = self.oldest if self.hand is None else self.hand
        while key in self.marked or not evictable(key):
            self.marked.discard(key)
            key = self.oldest if self.newer[key] is None else self.newer[key]
        self.hand = key
        return key
