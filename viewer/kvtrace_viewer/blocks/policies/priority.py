"""Evict by priority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvtrace_viewer.blocks.guard import Guard
from kvtrace_viewer.blocks.levels import run_levels
from kvtrace_viewer.blocks.policy import BlockPolicy, Outcome, parameter
from kvtrace_viewer.blocks.stream import BlockStream


@dataclass(frozen=True, kw_only=True)
class Priority(BlockPolicy):
    """Evict the lowest priority first: generated tokens, then prompts, then their first blocks.

    Within a priority the least recently used goes first. Serving engines take such priorities
    with a request (TensorRT-LLM's retention priority by token range); here they follow from
    where a block stands. A block has the priority of its last access.
    """

    name: ClassVar[str] = "priority"

    first: int = parameter(4, "first blocks of a prompt that have the highest", "blocks", 0)

    def run(self, stream: BlockStream, capacity: int, guard: Guard | None = None) -> Outcome:
        """Run; see `BlockPolicy.run`."""
        rank = np.where(stream.is_output, 0, np.where(stream.index < self.first, 2, 1))
        hits = np.zeros(stream.accesses, np.uint8)
        evictions = run_levels(
            stream.blocks,
            rank.astype(np.uint8),
            stream.num_blocks,
            capacity,
            True,
            hits,
            guard,
        )
        return Outcome(hits, evictions)
