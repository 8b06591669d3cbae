"""Pin the first blocks of every prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import FOREVER, Guard, new_guard
from kvtrace_viewer.blocks.levels import run_levels
from kvtrace_viewer.blocks.policy import BlockPolicy, Outcome, parameter
from kvtrace_viewer.blocks.stream import BlockStream


@dataclass(frozen=True, kw_only=True)
class PinnedPrefix(BlockPolicy):
    """Keep the first blocks of every prompt; of the rest, evict the one that came first.

    The token policy of the same name, at block level: pinned are the first `prefix` blocks of
    each prompt's own chain. With `hard` they are never evicted, and what comes while the cache
    is full of them is not kept; else they go, oldest first, when nothing else is left.
    """

    name: ClassVar[str] = "pinned_prefix"

    prefix: int = parameter(4, "first blocks of a prompt that are pinned", "blocks", 0)
    hard: bool = parameter(False, "never evict them at all", "true or false")

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        pinned = (stream.index < self.prefix) & ~stream.is_output
        hits = np.zeros(stream.accesses, np.uint8)
        if self.hard:
            others = np.arange(1, stream.accesses + 1) if guard is None else guard.until
            guard = new_guard(np.where(pinned, FOREVER, others), stream.num_blocks)
        evictions = run_levels(
            stream.blocks,
            np.where(pinned, 3, 0).astype(np.uint8),
            stream.num_blocks,
            capacity,
            False,
            hits,
            guard,
        )
        return Outcome(hits, evictions)
