"""Policies as decisions, one block at a time, in plain Python: the easy way to write one."""

from __future__ import annotations

from typing import Any

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.guard import FOREVER, Guard
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits
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

    def simulate(
        self,
        blocks: Ids,
        num_blocks: int,
        capacity: int,
        hits: Hits,
        guard: Guard | None = None,
    ) -> int:
        """Run; see `BlockPolicy.simulate`.

        A block that `evict` gives up and that must stay is handed back by `insert`, as though it
        had just come; one that must stay for good is not, and the policy hears of it no more.
        """
        state = self.start(capacity)
        held: set[int] = set()
        # Those of them that the policy was told of and has not given up.
        known: set[int] = set()
        stays: dict[int, int] = {}
        evictions = 0
        for i, block in enumerate(blocks.tolist()):
            if guard is not None:
                stays[block] = max(stays.get(block, 0), int(guard.until[i]))
            if block in held:
                hits[i] = 1
                if block in known:
                    self.hit(state, block)
                continue
            if len(held) == capacity:
                victim = self._victim(state, known, stays, i)
                if victim is None:
                    hits[i] = REFUSED
                    continue
                held.remove(victim)
                evictions += 1
            held.add(block)
            known.add(block)
            self.insert(state, block)
        return evictions

    def _victim(self, state: Any, known: set[int], stays: dict[int, int], now: int) -> int | None:
        """Ask until a block is given up that may go; None where none may."""
        back: list[int] = []
        found: int | None = None
        while known and found is None:
            victim = self.evict(state)
            if victim not in known:
                raise InputError(
                    f"evict of {self.name} returned block {victim}, which is not in the cache;"
                    " a block that is there was expected; return one that insert was told of"
                )
            known.remove(victim)
            if stays.get(victim, 0) <= now:
                found = victim
            elif stays[victim] < FOREVER:
                back.append(victim)
        for block in back:
            known.add(block)
            self.insert(state, block)
        return found
