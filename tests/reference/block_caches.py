"""Block caches step by step in plain Python, written from the papers, one dict or list at a time.

Slow on purpose: nothing is shared with the kernels but the order of the accesses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class Cache:
    """One access after the other; `access` says whether the block was there."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0

    def access(self, block: int) -> bool:
        raise NotImplementedError


class LRU(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.order: OrderedDict[int, None] = OrderedDict()

    def access(self, block: int) -> bool:
        if block in self.order:
            self.order.move_to_end(block)
            return True
        if len(self.order) == self.capacity:
            self.order.popitem(last=False)
            self.evictions += 1
        self.order[block] = None
        return False


class FIFO(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []

    def access(self, block: int) -> bool:
        if block in self.queue:
            return True
        if len(self.queue) == self.capacity:
            self.queue.pop(0)
            self.evictions += 1
        self.queue.append(block)
        return False


class Clock(Cache):
    """As a queue: a used block at its end goes to its begin, unused."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []
        self.used: dict[int, bool] = {}

    def access(self, block: int) -> bool:
        if block in self.queue:
            self.used[block] = True
            return True
        if len(self.queue) == self.capacity:
            while self.used[self.queue[0]]:
                spared = self.queue.pop(0)
                self.used[spared] = False
                self.queue.append(spared)
            self.queue.pop(0)
            self.evictions += 1
        self.queue.append(block)
        self.used[block] = False
        return False


class Sieve(Cache):
    """queue[0] is the oldest; the hand is the block to be looked at next."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []
        self.used: dict[int, bool] = {}
        self.hand: int | None = None

    def access(self, block: int) -> bool:
        if block in self.queue:
            self.used[block] = True
            return True
        if len(self.queue) == self.capacity:
            at = self.queue.index(self.hand) if self.hand is not None else 0
            while self.used[self.queue[at]]:
                self.used[self.queue[at]] = False
                at = (at + 1) % len(self.queue)
            self.hand = self.queue[at + 1] if at + 1 < len(self.queue) else None
            self.queue.pop(at)
            self.evictions += 1
        self.queue.append(block)
        self.used[block] = False
        return False


class Counting(Cache):
    """Least of a key that is made of the uses since the block came."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.uses: dict[int, list[int]] = {}
        self.now = 0

    def key(self, block: int) -> tuple[int, ...]:
        raise NotImplementedError

    def access(self, block: int) -> bool:
        self.now += 1
        hit = block in self.uses
        if not hit and len(self.uses) == self.capacity:
            del self.uses[min(self.uses, key=self.key)]
            self.evictions += 1
        self.uses.setdefault(block, []).append(self.now)
        return hit


class LFU(Counting):
    def key(self, block: int) -> tuple[int, ...]:
        return len(self.uses[block]), self.uses[block][-1]


class LRUK(Counting):
    k = 2

    def key(self, block: int) -> tuple[int, ...]:
        uses = self.uses[block]
        return (0, uses[-1]) if len(uses) < self.k else (1, uses[-self.k])


class LengthAware(Counting):
    """`index` gives each access its place in its request."""

    def __init__(self, capacity: int, index: Sequence[int]) -> None:
        super().__init__(capacity)
        self.index = index

    def key(self, block: int) -> tuple[int, ...]:
        last = self.uses[block][-1]
        return len(self.uses[block]), -self.index[last - 1], last


class SLRU(Cache):
    def __init__(self, capacity: int, segments: int = 4) -> None:
        super().__init__(capacity)
        self.levels: list[list[int]] = [[] for _ in range(min(segments, capacity))]  # newest last
        self.limit = capacity // len(self.levels)

    def access(self, block: int) -> bool:
        level = next((n for n, held in enumerate(self.levels) if block in held), None)
        if level is None:
            if sum(map(len, self.levels)) == self.capacity:
                next(held for held in self.levels if held).pop(0)
                self.evictions += 1
            room = [n for n, held in enumerate(self.levels) if len(held) < self.limit]
            self.levels[room[0] if room else 0].append(block)
            return False
        self.levels[level].remove(block)
        joins = min(level + 1, len(self.levels) - 1)
        self.levels[joins].append(block)
        while joins >= 0 and len(self.levels[joins]) > self.limit:
            lowered = self.levels[joins].pop(0)
            if joins:
                self.levels[joins - 1].append(lowered)
            else:
                self.evictions += 1
            if len(self.levels[joins]) <= self.limit:
                joins -= 1
        return True


class TwoQ(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.kin, self.kout = capacity // 4, capacity // 2
        self.a1in: list[int] = []
        self.a1out: list[int] = []
        self.am: list[int] = []

    def access(self, block: int) -> bool:
        if block in self.am:
            self.am.remove(block)
            self.am.append(block)
            return True
        if block in self.a1in:
            return True
        again = block in self.a1out
        if again:
            self.a1out.remove(block)
        if len(self.a1in) + len(self.am) == self.capacity:
            self.evictions += 1
            if len(self.a1in) > self.kin or not self.am:
                self.a1out.append(self.a1in.pop(0))
                if len(self.a1out) > self.kout:
                    self.a1out.pop(0)
            else:
                self.am.pop(0)
        (self.am if again else self.a1in).append(block)
        return False


class ARC(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.p = 0.0

    def replace(self, block: int) -> None:
        if len(self.t1) + len(self.t2) < self.capacity:
            return
        self.evictions += 1
        full = len(self.t1) > self.p or (block in self.b2 and len(self.t1) == self.p)
        if self.t1 and (full or not self.t2):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def access(self, block: int) -> bool:
        for held in (self.t1, self.t2):
            if block in held:
                held.remove(block)
                self.t2.append(block)
                return True
        if block in self.b1:
            self.p = min(self.capacity, self.p + max(1, len(self.b2) / len(self.b1)))
            self.replace(block)
            self.b1.remove(block)
            self.t2.append(block)
            return False
        if block in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.replace(block)
            self.b2.remove(block)
            self.t2.append(block)
            return False
        total = len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)
        if len(self.t1) + len(self.b1) == self.capacity:
            if len(self.t1) < self.capacity:
                self.b1.pop(0)
                self.replace(block)
            else:
                self.t1.pop(0)
                self.evictions += 1
        elif total >= self.capacity:
            if total == 2 * self.capacity:
                self.b2.pop(0)
            self.replace(block)
        self.t1.append(block)
        return False


class S3FIFO(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.room = {"small": int(capacity * 0.1), "ghost": int(capacity * 0.9)}
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.uses: dict[int, int] = {}

    def access(self, block: int) -> bool:
        if block in self.small or block in self.main:
            self.uses[block] = min(3, self.uses[block] + 1)
            return True
        again = block in self.ghost
        if again:
            self.ghost.remove(block)
        if len(self.small) + len(self.main) == self.capacity:
            self.evictions += 1
            while not self.evict_one():
                pass
        filling = not self.evictions and len(self.small) >= self.room["small"]
        self.uses[block] = 0
        (self.main if again or filling else self.small).append(block)
        return False

    def evict_one(self) -> bool:
        if len(self.main) > self.capacity - self.room["small"] or not self.small:
            block = self.main.pop(0)
            if not self.uses[block]:
                return True
            self.uses[block] -= 1
            self.main.append(block)
            return False
        block = self.small.pop(0)
        if self.uses[block] >= 2:
            self.uses[block] = 0
            self.main.append(block)
            return False
        self.ghost.append(block)
        if len(self.ghost) > self.room["ghost"]:
            self.ghost.pop(0)
        return True


class LIRS(Cache):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.most_low = capacity - max(1, int(capacity * 0.01))
        self.stack: list[int] = []  # top last
        self.queue: list[int] = []
        self.gone: list[int] = []
        self.low: set[int] = set()

    def access(self, block: int) -> bool:
        hit = block in self.low or block in self.queue
        if not hit and len(self.low) + len(self.queue) == self.capacity:
            victim = self.queue.pop(0)
            self.evictions += 1
            if victim in self.stack:
                self.gone.append(victim)
                if len(self.gone) > self.capacity:
                    self.stack.remove(self.gone.pop(0))
        in_stack = block in self.stack
        for place in (self.stack, self.queue, self.gone):
            if block in place:
                place.remove(block)
        self.stack.append(block)
        if in_stack or len(self.low) < self.most_low:
            self.low.add(block)
        else:
            self.queue.append(block)
        if len(self.low) > self.most_low:
            self.prune()
            lowered = self.stack.pop(0)
            self.low.remove(lowered)
            self.queue.append(lowered)
        self.prune()
        return hit

    def prune(self) -> None:
        while self.stack and self.stack[0] not in self.low:
            bottom = self.stack.pop(0)
            if bottom in self.gone:
                self.gone.remove(bottom)


class Belady(Cache):
    def __init__(self, capacity: int, blocks: Sequence[int]) -> None:
        super().__init__(capacity)
        self.blocks = list(blocks)
        self.held: set[int] = set()
        self.now = 0

    def next_use(self, block: int) -> int:
        later = self.blocks[self.now :]
        return later.index(block) if block in later else len(self.blocks)

    def access(self, block: int) -> bool:
        self.now += 1
        hit = block in self.held
        if not hit and len(self.held) == self.capacity:
            self.held.remove(max(self.held, key=self.next_use))
            self.evictions += 1
        self.held.add(block)
        return hit


class Holding(Cache):
    """Of the blocks that may go the first in an order; None where none may.

    `key` orders blocks by the accesses since they came, as their numbers; `until` says of each
    access from which one on its block may go, as far as it says.
    """

    def __init__(
        self, capacity: int, key: Callable[[list[int]], object], until: Sequence[int]
    ) -> None:
        super().__init__(capacity)
        self.key = key
        self.until = until
        self.uses: dict[int, list[int]] = {}
        self.stays: dict[int, int] = {}
        self.now = -1

    def serve(self, block: int) -> bool | None:
        self.now += 1
        self.stays[block] = max(self.stays.get(block, 0), self.until[self.now])
        hit = block in self.uses
        if not hit and len(self.uses) == self.capacity:
            free = [held for held in self.uses if self.stays[held] <= self.now]
            if not free:
                return None
            del self.uses[min(free, key=lambda held: self.key(self.uses[held]))]  # type: ignore[arg-type, return-value]
            self.evictions += 1
        self.uses.setdefault(block, []).append(self.now)
        return hit
