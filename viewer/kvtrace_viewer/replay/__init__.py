"""Replay: what another cache would have kept, from what a trace recorded. Headless.

>>> from kvtrace_viewer.replay import replay
>>> replay(kvtrace.open("run.kvtrace"), ["h2o", "lru"], ["25%"])      # doctest: +SKIP
"""

from kvtrace_viewer.replay.amounts import Amount, Budget, parse_budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache, Cuts
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy, parameter
from kvtrace_viewer.replay.replayable import replayable
from kvtrace_viewer.replay.result import Result
from kvtrace_viewer.replay.run import replay
from kvtrace_viewer.replay.selector import Selector
from kvtrace_viewer.replay.spec import parse_policy
from kvtrace_viewer.replay.when import When, parse_when

__all__ = [
    "POLICIES",
    "Amount",
    "Block",
    "Budget",
    "Cache",
    "Cuts",
    "Head",
    "Measures",
    "Policy",
    "Result",
    "Selector",
    "When",
    "parameter",
    "parse_budget",
    "parse_policy",
    "parse_when",
    "replay",
    "replayable",
]
