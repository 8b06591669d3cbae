"""Block caches: a workload's block stream through policies and capacities. Headless.

>>> from kvtrace_viewer.blocks import read_stream, replay_blocks
>>> replay_blocks(read_stream(kvtrace.open("run.kvtrace")), ["lru"], [1000])    # doctest: +SKIP
"""

from kvtrace_viewer.blocks.accounting import Accounting
from kvtrace_viewer.blocks.curve import LRUCurve, lru_curve, sampled_lru_curve
from kvtrace_viewer.blocks.holding import Held
from kvtrace_viewer.blocks.policies import POLICIES
from kvtrace_viewer.blocks.policy import BlockPolicy, Outcome, parameter
from kvtrace_viewer.blocks.result import BlockResult
from kvtrace_viewer.blocks.run import replay_blocks
from kvtrace_viewer.blocks.sizes import curve_capacities, replay_curves
from kvtrace_viewer.blocks.sources import read_stream
from kvtrace_viewer.blocks.spec import parse_block_policy
from kvtrace_viewer.blocks.steps import StepPolicy
from kvtrace_viewer.blocks.stream import BlockStream, dense_ids

__all__ = [
    "POLICIES",
    "Accounting",
    "BlockPolicy",
    "BlockResult",
    "BlockStream",
    "Held",
    "LRUCurve",
    "Outcome",
    "StepPolicy",
    "curve_capacities",
    "dense_ids",
    "lru_curve",
    "parameter",
    "parse_block_policy",
    "read_stream",
    "replay_blocks",
    "replay_curves",
    "sampled_lru_curve",
]
