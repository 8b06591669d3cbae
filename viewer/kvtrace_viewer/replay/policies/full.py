"""The full cache: the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvtrace_viewer.replay.block import Block
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep every token, whatever the budget.

    On layers with a sliding window it keeps what the model itself keeps.
    """

    name: ClassVar[str] = "full"
    signals: ClassVar[frozenset[str]] = frozenset()

    @property
    def bound_scope(self) -> None:
        """None: it keeps more than any budget."""
        return None

    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Evict nothing."""
