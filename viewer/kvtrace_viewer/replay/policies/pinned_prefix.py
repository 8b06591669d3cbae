"""A pinned prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow
from kvtrace_viewer.replay.policy import parameter


@dataclass(frozen=True, kw_only=True)
class PinnedPrefix(SlidingWindow):
    """Pin a prefix (a system prompt, say) and evict the oldest of the rest.

    streaming_llm with a prefix of a length that matters to the user in the place of sinks.
    """

    name: ClassVar[str] = "pinned_prefix"

    sinks: int = parameter(32, "tokens of the pinned prefix", "tokens", 0)
