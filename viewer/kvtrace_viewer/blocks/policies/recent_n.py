"""Read only the last blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.blocks.guard import Guard
from kvtrace_viewer.blocks.policies.fifo import FIFO
from kvtrace_viewer.blocks.policy import UNREAD, BlockPolicy, Outcome, parameter
from kvtrace_viewer.blocks.stream import BlockStream


@dataclass(frozen=True, kw_only=True)
class RecentN(BlockPolicy):
    """Ask only for the last blocks of each request; all are stored, the first to come goes first.

    The token policy of the same name, at block level: it limits what is read, not what is
    stored. What is not read is no access.
    """

    name: ClassVar[str] = "recent_n"

    n: int = parameter(64, "last blocks of a request that are read", "blocks", 1)

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        found = FIFO().run(stream, capacity, guard)
        hits = np.where(self.reads(stream), found.hits, UNREAD)
        return Outcome(hits.astype(np.uint8), found.evictions)

    def reads(self, stream: BlockStream) -> NDArray[np.bool_]:
        """Which accesses are of the last blocks; see `BlockPolicy.reads`."""
        stops = np.repeat(stream.starts[1:], np.diff(stream.starts))
        return stops - np.arange(stream.accesses) <= self.n
