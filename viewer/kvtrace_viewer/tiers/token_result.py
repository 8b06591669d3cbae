"""What placing the tokens of a recorded run came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtrace_viewer.replay.kernels import NEVER, Doubles, Longs
from kvtrace_viewer.tiers.hardware import Hardware
from kvtrace_viewer.tiers.options import Options
from kvtrace_viewer.tiers.placement import HeadPlacement
from kvtrace_viewer.tiers.recorded import RecordedSteps
from kvtrace_viewer.tiers.spread import spread

#: Tiers of a token placement: hot and cold.
HOT, COLD = range(2)


@dataclass(frozen=True, eq=False)
class PlacedTokens:
    """The tokens of one request; columns of table `tier_tokens`, over layers and KV heads.

    Attributes
    ----------
    slots, cold_slots, first_cold, fetches : int64 [token]
        `first_cold` is -1 where no slot of the token went to the second tier.
    late_mass : float64 [token]
    """

    slots: Longs
    cold_slots: Longs
    first_cold: Longs
    fetches: Longs
    late_mass: Doubles

    @classmethod
    def none(cls, tokens: int) -> PlacedTokens:
        """Tokens of which no slot was looked at yet."""
        counts = [np.zeros(tokens, np.int64) for _ in range(3)]
        return cls(counts[0], counts[1], np.full(tokens, -1, np.int64), counts[2], np.zeros(tokens))

    def add(self, head: HeadPlacement) -> None:
        """Add the slots of one head."""
        cold = head.cold_after != NEVER
        self.slots[:] += 1
        self.cold_slots[:] += cold
        earlier = cold & ((self.first_cold < 0) | (head.cold_after < self.first_cold))
        self.first_cold[earlier] = head.cold_after[earlier]
        self.fetches[:] += head.fetches
        self.late_mass[:] += head.late_of


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenResult:
    """A recorded run, its tokens placed by a replay.

    Attributes
    ----------
    replay : str
        The replay that places them.
    hardware : Hardware
        The machine; its first two tiers.
    options : Options
        The rules.
    needed_share : float
        The threshold of being needed.
    steps : RecordedSteps
        All steps of the recording; what follows is by their places.
    rows : int64 [step]
        Decoded tokens of the step that were placed.
    fetched, moved_down : int64 [step]
        Slots.
    bytes_up, bytes_down : int64 [step]
    held : int64 [step, 2]
        Bytes in each tier after the step.
    stall_ns : int64 [step]
        0 where the step decodes nothing.
    retained, late, lost : float64 [step]
        Mean over the step's rows, their layers and query heads; NaN where it decodes nothing.
    hits, misses : int
        Needed (query, key) pairs of decoded rows, hot and cold.
    tokens : mapping of int to PlacedTokens
        By request.
    notes : tuple of str
        What must be known to read it.
    """

    replay: str
    hardware: Hardware
    options: Options
    needed_share: float
    steps: RecordedSteps
    rows: Longs
    fetched: Longs
    moved_down: Longs
    bytes_up: Longs
    bytes_down: Longs
    held: Longs
    stall_ns: Longs
    retained: Doubles
    late: Doubles
    lost: Doubles
    hits: int
    misses: int
    tokens: dict[int, PlacedTokens]
    notes: tuple[str, ...]

    @property
    def decodes(self) -> Longs:
        """Places of the steps that decode something."""
        return np.flatnonzero(self.rows)

    @property
    def compute_ns(self) -> Longs:
        """Recorded durations of the steps that decode something."""
        return self.steps.duration_ns[self.decodes]

    def mean(self, values: Doubles) -> float | None:
        """Mean of a step's value over the decoded rows; None where there are none."""
        at = self.decodes
        return float(np.average(values[at], weights=self.rows[at])) if len(at) else None

    def tokens_per_s(self, stalls_too: bool) -> float | None:
        """Decoded tokens by the time of their steps, as recorded or with the stalls."""
        took = int(self.compute_ns.sum()) + (int(self.stall_ns.sum()) if stalls_too else 0)
        return float(self.rows.sum()) / took * 1e9 if took else None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        cold = sum(int(one.cold_slots.sum()) for one in self.tokens.values())
        return {
            "kind": "tokens",
            "replay": self.replay,
            "hardware": self.hardware.name,
            "mode": self.options.mode,
            "overlap": self.options.overlap,
            "needed_share": self.needed_share,
            "requests": len(self.tokens),
            "decode_steps": len(self.decodes),
            "decoded_tokens": int(self.rows.sum()),
            "slots": sum(int(one.slots.sum()) for one in self.tokens.values()),
            "cold_slots": cold,
            "fetched_slots": int(self.fetched.sum()),
            "hits": self.hits,
            "misses": self.misses,
            "retained_mass": self.mean(self.retained),
            "late_mass": self.mean(self.late),
            "lost_mass": self.mean(self.lost),
            "tiers": [self._tier(number) for number in (HOT, COLD)],
            "compute_s": float(self.compute_ns.sum()) / 1e9,
            "stall_s": spread(self.stall_ns[self.decodes]),
            "steps_that_stall": int((self.stall_ns > 0).sum()),
            "tokens_per_s": self.tokens_per_s(stalls_too=True),
            "recorded_tokens_per_s": self.tokens_per_s(stalls_too=False),
            "notes": list(self.notes),
        }

    def _tier(self, number: int) -> dict[str, Any]:
        tier, held = self.hardware.tiers[number], self.held[:, number]
        return {
            "tier": tier.name,
            "bytes_up": int(self.bytes_up.sum()) if number == COLD else 0,
            "bytes_down": int(self.bytes_down.sum()) if number == COLD else 0,
            "peak_bytes": int(held.max(initial=0)),
            "mean_bytes": float(held.mean()) if len(held) else 0.0,
            "cost_per_hour": tier.cost_per_hour,
        }
