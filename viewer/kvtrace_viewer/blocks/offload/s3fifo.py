"""S3-FIFO as vLLM's CachePolicy: a small queue filters out what is used once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kvtrace_viewer.blocks.offload.ordered import OrderedPolicy


class S3FIFOPolicy(OrderedPolicy):
    """Three first-in-first-out queues (Yang et al., SOSP 2023): small, main, remembered."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.room = int(cache_capacity * 0.1)
        self.remembered = int(cache_capacity * 0.9)
        self.small: OrderedDict[Any, None] = OrderedDict()
        self.main: OrderedDict[Any, None] = OrderedDict()
        self.ghost: OrderedDict[Any, None] = OrderedDict()
        self.returning: set[Any] = set()
        self.uses: dict[Any, int] = {}
        self.has_evicted = False

    def joined(self, key: Any) -> None:
        """One that is remembered goes to the main queue, and so does overflow at the start."""
        again = key in self.ghost or key in self.returning
        self.ghost.pop(key, None)
        self.returning.discard(key)
        filling = not self.has_evicted and len(self.small) >= self.room
        (self.main if again or filling else self.small)[key] = None
        self.uses[key] = 0

    def used(self, key: Any) -> None:
        """Count, up to three."""
        self.uses[key] = min(3, self.uses[key] + 1)

    def evict(self, n: int, protected: set[Any]) -> list[tuple[Any, Any]] | None:
        """What comes in now is remembered no longer, which leaves room for what goes."""
        self.returning = {key for key in protected if key in self.ghost}
        for key in self.returning:
            del self.ghost[key]
        return super().evict(n, protected)

    def left(self, key: Any, *, evicted: bool) -> None:
        """Remember what the small queue evicted."""
        self.has_evicted |= evicted
        del self.uses[key]
        if key in self.main:
            del self.main[key]
            return
        del self.small[key]
        if evicted and self.remembered:
            self.ghost[key] = None
            if len(self.ghost) > self.remembered:
                self.ghost.popitem(last=False)

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """Go through the queues; what may not go takes another round."""
        while True:
            if len(self.main) > self.capacity - self.room or not self.small:
                key = next(iter(self.main))
                if not self.uses[key] and evictable(key):
                    return key
                self.uses[key] = max(0, self.uses[key] - 1)
                self.main.move_to_end(key)
                continue
            key = next(iter(self.small))
            if self.uses[key] < 2 and evictable(key):
                return key
            self.uses[key] = 0
            del self.small[key]
            self.main[key] = None
