"""Attention sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow
from kvtrace_viewer.replay.policy import parameter


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(SlidingWindow):
    """Keep the first tokens, which soak up attention, and the last B - sinks.

    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks",
    arXiv:2309.17453. Deviation: positions stay as recorded, where the paper numbers them within
    the cache; `--rerotate` does that.
    """

    name: ClassVar[str] = "streaming_llm"
    default_when: ClassVar[str] = "stream"

    sinks: int = parameter(4, "first tokens that are never evicted", "tokens", 0)
