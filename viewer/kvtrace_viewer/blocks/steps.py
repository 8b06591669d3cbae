"""Policies as decisions, one block at a time, in plain Python: the easy way to write one."""

from __future__ import annotations

from typing import Any

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.policy import BlockPolicy, Hits
from kvtrace_viewer.blocks.stream import Ids


class StepPolicy(BlockPolicy):
    """A policy that is told of each access, and asked for a victim when the cache is full.

    It keeps nothing in itself: what it must remember is the state that `start` returns. Some
    million accesses a minute; a policy that is to be faster defines `simulate` and compiles it
    (`kvtrace_viewer.replay.jit.jit`).
    """

    def start(self, capacity: int) -> Any:
        """Return the state of an empty cache of so many blocks."""
        raise NotImplementedError

    def hit(self, state: Any, block: int) -> None:
        """A block was asked for and is there."""

    def insert(self, state: Any, block: int) -> None:
        """A block comes in."""
        raise NotImplementedError

    def evict(self, state: Any) -> int:
        """Choose a block that is there, forget it, and return it."""
        raise NotImplementedError

    def simulate(self, blocks: Ids, num_blocks: int, capacity: int, hits: Hits) -> int:
        """Run; see `BlockPolicy.simulate`."""
        state = self.start(capacity)
        held: set[int] = set()
        evictions = 0
        for i, block in enumerate(blocks.tolist()):
            if block in held:
                hits[i] = 1
                self.hit(state, block)
                continue
            if len(held) == capacity:
                victim = self.evict(state)
                if victim not in held:
                    raise InputError(
                        f"evict of {self.name} returned block {victim}, which is not in the cache;"
                        " a block that is there was expected; return one that insert was told of"
                    )
                held.remove(victim)
                evictions += 1
            held.add(block)
            self.insert(state, block)
        return evictions
