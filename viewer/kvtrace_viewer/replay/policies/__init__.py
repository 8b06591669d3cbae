"""The policies, one a file.

A new file needs one line here; a test fails for a file that has none.
"""

from __future__ import annotations

from kvtrace_viewer.replay.policies.block_keydiff import BlockKeyDiff
from kvtrace_viewer.replay.policies.cur import CUR
from kvtrace_viewer.replay.policies.fifo import FIFO
from kvtrace_viewer.replay.policies.full import Full
from kvtrace_viewer.replay.policies.h2o import H2O
from kvtrace_viewer.replay.policies.keydiff import KeyDiff
from kvtrace_viewer.replay.policies.knorm import KNorm
from kvtrace_viewer.replay.policies.lagkv import LagKV
from kvtrace_viewer.replay.policies.lfu import LFU
from kvtrace_viewer.replay.policies.lru import LRU
from kvtrace_viewer.replay.policies.observed_attention import ObservedAttention
from kvtrace_viewer.replay.policies.oracle import Oracle
from kvtrace_viewer.replay.policies.pinned_prefix import PinnedPrefix
from kvtrace_viewer.replay.policies.pyramidkv import PyramidKV
from kvtrace_viewer.replay.policies.random import Random
from kvtrace_viewer.replay.policies.sliding_window import SlidingWindow
from kvtrace_viewer.replay.policies.snapkv import SnapKV
from kvtrace_viewer.replay.policies.streaming_llm import StreamingLLM
from kvtrace_viewer.replay.policies.tova import TOVA
from kvtrace_viewer.replay.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        SlidingWindow,
        StreamingLLM,
        PinnedPrefix,
        FIFO,
        Random,
        LRU,
        LFU,
        H2O,
        ObservedAttention,
        TOVA,
        SnapKV,
        PyramidKV,
        KNorm,
        KeyDiff,
        BlockKeyDiff,
        LagKV,
        CUR,
        Oracle,
    )
}
"""Every policy of ours by the name users write."""
