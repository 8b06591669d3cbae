"""The rules that a tier replay runs by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvtrace.errors import InputError
from kvtrace_viewer.tiers.order import order_number

MODES = {
    "evict": "a block moves down when it is pushed out, and back up when it is used",
    "write-through": "a block is copied down as it is computed, as vLLM's offloading does",
}
LOADS = {
    "cheaper": "load as much of what lies below as ends the request soonest, compute the rest",
    "always": "load whatever lies below",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How blocks move.

    Attributes
    ----------
    policy : str
        Which block a tier gives up: `order.ORDERS`.
    mode : str
        `MODES`.
    load : str
        `LOADS`.
    overlap : bool
        Whether the loads of a layer hide behind the computing of the layers before it.
    prefetch : bool
        Whether loads begin when a request arrives, rather than when its turn comes.
    max_batch : int
        Requests that decode at once; 0: prompts alone are served.
    """

    policy: str = "lru"
    mode: str = "evict"
    load: str = "cheaper"
    overlap: bool = True
    prefetch: bool = False
    max_batch: int = 0

    def __post_init__(self) -> None:
        order_number(self.policy)
        if self.max_batch < 0:
            raise InputError(
                f"--max-batch is {self.max_batch}; at least 0 was expected; write --max-batch 256"
            )
        for what, known in (("mode", MODES), ("load", LOADS)):
            if getattr(self, what) not in known:
                raise InputError(
                    f"{what} {getattr(self, what)!r} is unknown; one of {', '.join(known)} was"
                    " expected; kvtrace tiers --help explains them"
                )

    def to_json(self) -> dict[str, Any]:
        """The rules as plain values."""
        return {
            "policy": self.policy,
            "mode": self.mode,
            "load": self.load,
            "overlap": self.overlap,
            "prefetch": self.prefetch,
            "max_batch": self.max_batch,
        }
