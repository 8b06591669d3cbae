"""A pool of blocks: who holds which, what is cached, what is free. Nothing is ever lost."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtrace_viewer.allocation.history import ALLOCATE, EVICT, FREE, KEEP, SHARE

#: What goes where cached blocks, which nobody holds, stand in the way.
POLICIES = {
    "all": "all cached blocks at once, when free ones run short (transformers)",
    "lru": "the one that was let go longest ago, a request's last block first (vLLM)",
    "fifo": "the one that was computed first",
    "lfu": "the one that was shared least often; of several the one let go longest ago",
    "none": "nothing is cached",
}
Emit = Callable[[int, int, int, int], None]


@dataclass
class BlockPool:
    """Blocks 0 to `size` - 1, each free, held by requests, or cached and held by none.

    Free blocks are handed out as transformers does: those that were freed since the last `settle`
    in that order, and only then others, the highest first. So block numbers can be compared.

    Parameters
    ----------
    size : int
        Blocks.
    policy : str
        Of `POLICIES`.
    emit : callable
        Told every event: kind, request, block, index in the request's table.
    """

    size: int
    policy: str
    emit: Emit
    users: dict[int, int] = field(default_factory=dict)
    #: Blocks that nobody holds, by when they were let go.
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    content_of: dict[int, int] = field(default_factory=dict)
    block_of: dict[int, int] = field(default_factory=dict)
    evictions: int = 0
    hits: int = 0

    def __post_init__(self) -> None:
        self._fresh = list(range(self.size))
        self._returned: deque[int] = deque()
        self._born: dict[int, int] = {}
        self._shared: dict[int, int] = {}
        self._allocations = 0
        #: Of fifo and lfu: cached blocks by rank; entries of blocks that are cached no more stay.
        self._ranked: list[tuple[int, int, int]] = []
        self._rank_of: dict[int, int] = {}
        self._releases = 0

    @property
    def free(self) -> int:
        """Blocks that are neither held nor cached."""
        return len(self._fresh) + len(self._returned)

    @property
    def available(self) -> int:
        """Blocks that an allocation can have."""
        return self.free + (len(self.cached) if self._evicts_singly else 0)

    @property
    def _evicts_singly(self) -> bool:
        return self.policy in ("lru", "fifo", "lfu")

    def settle(self) -> None:
        """Put returned blocks with the others, before a step is scheduled."""
        self._fresh += self._returned
        self._returned.clear()

    def allocate(self, request: int, table: list[int], count: int) -> None:
        """Give `count` blocks to a request, at the end of its table; there must be as many."""
        while self.free < count:
            self._evict(self._victim())
        for _ in range(count - len(self._returned)):
            self._returned.append(self._fresh.pop())
        for _ in range(count):
            block = self._returned.popleft()
            self.users[block] = 1
            self._allocations += 1
            self._born[block], self._shared[block] = self._allocations, 0
            self.emit(ALLOCATE, request, block, len(table))
            table.append(block)

    def share(self, request: int, block: int, index: int) -> None:
        """Give a block with the wanted contents to one more request."""
        self.cached.pop(block, None)
        self.users[block] = self.users.get(block, 0) + 1
        self._shared[block] += 1
        self.hits += 1
        self.emit(SHARE, request, block, index)

    def match(self, contents: Sequence[int]) -> list[int]:
        """Blocks that hold the contents, until the first that none holds."""
        found = []
        for content in contents:
            block = self.block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def complete(self, request: int, table: list[int], contents: Sequence[int], new: int) -> None:
        """Let `new` blocks that became full be found by their contents.

        One whose contents another block has gives way to it.
        """
        if self.policy == "none":
            return
        for index, block in enumerate(table):
            if block in self.content_of:
                continue
            if new == 0 or index >= len(contents):
                return
            new -= 1
            known = self.block_of.get(contents[index])
            if known is None:
                self.block_of[contents[index]] = block
                self.content_of[block] = contents[index]
                continue
            self._release(request, block, index)
            self.share(request, known, index)
            self.hits -= 1
            table[index] = known

    def release(self, request: int, table: list[int], *, keep: bool = True) -> None:
        """Take all blocks from a request; without `keep` what it alone holds is not cached."""
        order = range(len(table))
        # The tail of a sequence is the first to go: nobody can use it without what is before.
        for index in reversed(order) if self._evicts_singly else order:
            self._release(request, table[index], index, keep)
        table.clear()

    def _release(self, request: int, block: int, index: int, keep: bool = True) -> None:
        self.users[block] -= 1
        kept = block in self.content_of and (keep or self.users[block] > 0)
        self.emit(KEEP if kept else FREE, request, block, index)
        if self.users[block]:
            return
        del self.users[block]
        if kept:
            self.cached[block] = None
            self._rank(block)
        else:
            self._forget(block)
            self._returned.append(block)

    def evict_cached(self) -> bool:
        """Free every cached block; whether there was one."""
        found = bool(self.cached)
        while self.cached:
            self._evict(next(iter(self.cached)))
        return found

    def _evict(self, block: int) -> None:
        del self.cached[block]
        self._forget(block)
        self._returned.append(block)
        self.evictions += 1
        self.emit(EVICT, -1, block, -1)

    def _rank(self, block: int) -> None:
        if self.policy in ("fifo", "lfu"):
            self._releases += 1
            worth = self._born[block] if self.policy == "fifo" else self._shared[block]
            heapq.heappush(self._ranked, (worth, self._releases, block))
            self._rank_of[block] = self._releases

    def _victim(self) -> int:
        if self.policy == "lru":
            return next(iter(self.cached))
        while True:
            _, release, block = heapq.heappop(self._ranked)
            if block in self.cached and self._rank_of[block] == release:
                return block

    def _forget(self, block: int) -> None:
        content = self.content_of.pop(block, None)
        if content is not None:
            del self.block_of[content]
