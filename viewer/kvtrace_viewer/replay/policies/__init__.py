"""The policies, one a file.

A new file needs one line here; a test fails for a file that has none.
"""

from __future__ import annotations

from kvtrace_viewer.replay.policies.full import Full
from kvtrace_viewer.replay.policies.h2o import H2O
from kvtrace_viewer.replay.policies.lru import LRU
from kvtrace_viewer.replay.policies.oracle import Oracle
from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow
from kvtrace_viewer.replay.policies.streaming_llm import StreamingLLM
from kvtrace_viewer.replay.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        SlidingWindow,
        StreamingLLM,
        LRU,
        H2O,
        Oracle,
    )
}
"""Every policy of ours by the name users write."""
