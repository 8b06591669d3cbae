"""The cookbook's twenty questions in numpy: what a script without SQL would do.

Each takes columns and arrays that are in memory already and gives the rows of the answer.
"""

from __future__ import annotations

from benchmarks.sql_by_hand import arrays, heads, policies, serving
from benchmarks.sql_by_hand.data import Data

__all__ = ["BY_HAND", "Data"]

#: In the order of the cookbook.
BY_HAND = (
    serving.latency,
    serving.slow_steps,
    serving.waiting,
    serving.peak_memory,
    serving.bytes_per_token,
    serving.frequent_tokens,
    serving.complete,
    heads.sink_tokens,
    heads.sink_heads,
    heads.local_heads,
    heads.entropies,
    heads.heavy_tokens,
    heads.groups_agree,
    arrays.last_token,
    arrays.prompt_share,
    arrays.previous_token,
    arrays.induction,
    arrays.short_keys,
    policies.policies,
    policies.missed_tokens,
)
