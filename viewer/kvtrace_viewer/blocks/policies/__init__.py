"""The block policies, one a file.

A new file needs one line here; a test fails for a file that has none.
"""

from __future__ import annotations

from kvtrace_viewer.blocks.policies.arc import ARC
from kvtrace_viewer.blocks.policies.belady import Belady
from kvtrace_viewer.blocks.policies.clock import Clock
from kvtrace_viewer.blocks.policies.fifo import FIFO
from kvtrace_viewer.blocks.policies.length_aware import LengthAware
from kvtrace_viewer.blocks.policies.lfu import LFU
from kvtrace_viewer.blocks.policies.lirs import LIRS
from kvtrace_viewer.blocks.policies.lru import LRU
from kvtrace_viewer.blocks.policies.lru_k import LRUK
from kvtrace_viewer.blocks.policies.pinned_prefix import PinnedPrefix
from kvtrace_viewer.blocks.policies.priority import Priority
from kvtrace_viewer.blocks.policies.recent_n import RecentN
from kvtrace_viewer.blocks.policies.s3fifo import S3FIFO
from kvtrace_viewer.blocks.policies.sieve import Sieve
from kvtrace_viewer.blocks.policies.sliding_window import SlidingWindow
from kvtrace_viewer.blocks.policies.slru import SLRU
from kvtrace_viewer.blocks.policies.two_q import TwoQ
from kvtrace_viewer.blocks.policies.vllm import VLLM
from kvtrace_viewer.blocks.policies.wtinylfu import WTinyLFU
from kvtrace_viewer.blocks.policy import BlockPolicy

POLICIES: dict[str, type[BlockPolicy]] = {
    policy.name: policy
    for policy in (
        LRU,
        FIFO,
        Clock,
        LFU,
        Sieve,
        S3FIFO,
        ARC,
        TwoQ,
        SLRU,
        LIRS,
        LRUK,
        WTinyLFU,
        LengthAware,
        SlidingWindow,
        PinnedPrefix,
        RecentN,
        Priority,
        VLLM,
        Belady,
    )
}
"""Every policy of ours by the name users write."""
