"""Keep only the last blocks of every request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.chain import new_links, push_head, unlink
from kvtrace_viewer.blocks.guard import Guard, hold, last_free, may_go, refuse
from kvtrace_viewer.blocks.policy import REFUSED, BlockPolicy, Hits, Outcome, parameter
from kvtrace_viewer.blocks.stream import BlockStream, Counts, Ids
from kvtrace_viewer.replay.jit import jit


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(BlockPolicy):
    """Keep the last blocks of each request's chain; earlier ones go when it is done.

    The token policy of the same name, at block level, as engines free what lies behind the
    window of sliding-window layers. A block belongs to the chain of the request that used it
    last. Where the cache is full before, the least recently used block goes. What must stay
    when its request is done stays until then, too.
    """

    name: ClassVar[str] = "sliding_window"

    window: int = parameter(64, "last blocks of a request that are kept", "blocks", 1)

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        hits = np.zeros(stream.accesses, np.uint8)
        evictions = _sliding_window(
            stream.blocks, stream.starts, stream.num_blocks, capacity, self.window, hits, guard
        )
        return Outcome(hits, evictions)


@jit
def _sliding_window(
    blocks: Ids,
    starts: Counts,
    num_blocks: int,
    capacity: int,
    window: int,
    hits: Hits,
    guard: Guard | None,
) -> int:
    links = new_links(num_blocks, 1)
    held = 0
    evictions = 0
    for r in range(len(starts) - 1):
        start, stop = starts[r], starts[r + 1]
        for i in range(start, stop):
            block = blocks[i]
            hold(guard, block, i)
            if links[block, 0] >= 0:
                hits[i] = 1
                unlink(links, block)
            elif held == capacity:
                victim = last_free(links, num_blocks, guard, i)
                if victim == num_blocks:
                    hits[i] = REFUSED
                    refuse(guard, i)
                    continue
                unlink(links, victim)
                evictions += 1
            else:
                held += 1
            push_head(links, num_blocks, block)
        for i in range(start, stop - window):
            if links[blocks[i], 0] >= 0 and may_go(guard, blocks[i], stop):
                unlink(links, blocks[i])
                held -= 1
                evictions += 1
    return evictions
