"""First in, first out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow


@dataclass(frozen=True, kw_only=True)
class FIFO(SlidingWindow):
    """Evict the token that came first.

    The classic of operating systems. In a KV cache tokens come in the order of their positions,
    so it keeps what sliding_window keeps.
    """

    name: ClassVar[str] = "fifo"
