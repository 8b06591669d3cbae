"""A policy of your own in fifteen lines: forget what has not been looked at for a while."""

from dataclasses import dataclass

import numpy as np

from kvtrace_viewer.replay import Policy, parameter


@dataclass(frozen=True, kw_only=True)
class Fading(Policy):
    """Keep what was attended to lately: attention received, counting less the older it is."""

    half_life: float = parameter(16.0, "rows after which attention counts half", "rows", 1)

    def start(self, head, cuts):
        return np.zeros(head.tokens)

    def scores(self, block, cuts, state):
        found = []
        for row in range(block.start, block.stop):
            state *= 0.5 ** (1 / self.half_life)
            state[: block.stop] += block.received[row - block.start]
            if row in cuts.rows:
                found.append(state[: block.stop].copy())
        return np.array(found)
