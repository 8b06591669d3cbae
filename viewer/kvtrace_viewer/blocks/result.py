"""What a block policy at one capacity came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtrace_viewer.blocks.accounting import Accounting
from kvtrace_viewer.blocks.holding import Held


@dataclass(frozen=True)
class BlockResult:
    """One policy at one capacity.

    Attributes
    ----------
    policy : str
        As `name:key=value,...`.
    parameters : dict
        Every parameter, defaults too.
    capacity : int
        Blocks.
    requests : int
        Requests of the stream.
    accesses, hits : int
        In the accounting's unit.
    evictions : int
        Blocks evicted.
    accounting : Accounting
        What counts as an access and as a hit.
    notes : tuple of str
        What must be known to read it.
    error : float or None
        Twice the standard error of the hit ratio, where it is of a sample; None: exact.
    held : Held or None
        What had to stay, where something had to.
    """

    policy: str
    parameters: dict[str, Any]
    capacity: int
    requests: int
    accesses: int
    hits: int
    evictions: int
    accounting: Accounting
    notes: tuple[str, ...] = ()
    error: float | None = None
    held: Held | None = None

    @property
    def hit_ratio(self) -> float | None:
        """Hits over accesses; None without an access."""
        return self.hits / self.accesses if self.accesses else None

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "policy": self.policy,
            "parameters": self.parameters,
            "capacity": self.capacity,
            "requests": self.requests,
            "accesses": self.accesses,
            "hits": self.hits,
            "evictions": self.evictions,
            "hit_ratio": self.hit_ratio,
            "error": self.error,
            "accounting": self.accounting.to_json(),
            "notes": list(self.notes),
            **({} if self.held is None else {"held": self.held.to_json()}),
        }
