"""What the exported policies have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from kvtrace_viewer.blocks.offload.interface import CachePolicy


class OrderedPolicy(CachePolicy):
    """Blocks in a dict; a policy says what a use and a victim are.

    `evictable` is true of keys that may go now: of no transfer, and not protected.
    """

    def __init__(self, cache_capacity: int) -> None:
        self.capacity = cache_capacity
        self.blocks: OrderedDict[Any, Any] = OrderedDict()

    def joined(self, key: Any) -> None:
        """A block came in; it stands last in `blocks`."""

    def used(self, key: Any) -> None:
        """A block that is there was used."""

    def left(self, key: Any, *, evicted: bool) -> None:
        """A block is gone from `blocks`."""

    def victim(self, evictable: Callable[[Any], bool]) -> Any:
        """The evictable key that goes next; there is one."""
        raise NotImplementedError

    def get(self, key: Any) -> Any:
        """Return the block of a key, or None."""
        return self.blocks.get(key)

    def insert(self, key: Any, block: Any) -> None:
        """Add a block."""
        self.blocks[key] = block
        self.joined(key)

    def remove(self, key: Any) -> None:
        """Take a block out."""
        del self.blocks[key]
        self.left(key, evicted=False)

    def touch(self, keys: Iterable[Any], req_context: Any = None) -> None:
        """Note that blocks were used."""
        for key in keys:
            if key in self.blocks:
                self.used(key)

    def evict(self, n: int, protected: set[Any]) -> list[tuple[Any, Any]] | None:
        """Evict n blocks; None where fewer can go."""

        def evictable(key: Any) -> bool:
            return self.blocks[key].ref_cnt == 0 and key not in protected

        if len(list(islice(filter(evictable, self.blocks), n))) < n:
            return None
        gone = []
        for _ in range(n):
            key = self.victim(evictable)
            gone.append((key, self.blocks.pop(key)))
            self.left(key, evicted=True)
        return gone

    def clear(self) -> None:
        """Take out every block, and forget the past."""
        self.__init__(self.capacity)  # type: ignore[misc]
