"""The policies, one a file.

A new policy is a file here and its name in `NAMES`: one line. A test fails for a file that has
none. Policies that live elsewhere come in by `kvtrace_viewer.replay.plugins`.
"""

from __future__ import annotations

from importlib import import_module

from kvtrace_viewer.replay.policy import Policy

NAMES = (
    "full",
    "sliding_window",
    "streaming_llm",
    "pinned_prefix",
    "recent_n",
    "fifo",
    "random",
    "lru",
    "lfu",
    "h2o",
    "observed_attention",
    "scissorhands",
    "keyformer",
    "tova",
    "caote",
    "snapkv",
    "pyramidkv",
    "adakv",
    "headkv",
    "duo_attention",
    "criticalkv",
    "defensivekv",
    "chunkkv",
    "cake",
    "nacl",
    "knorm",
    "keydiff",
    "block_keydiff",
    "lagkv",
    "cur",
    "expected_attention",
    "r_kv",
    "quest",
    "rocketkv",
    "top_k",
    "recorded",
    "kvzip",
    "oracle",
)
"""Files of this folder, in the order that users see."""


def _policy_of(name: str) -> type[Policy]:
    """Return the class of one file: the one that bears its name."""
    module = import_module(f"{__name__}.{name}")
    found: type[Policy] = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Policy) and value.name == name
    )
    return found


POLICIES: dict[str, type[Policy]] = {name: _policy_of(name) for name in NAMES}
"""Every policy of ours by the name users write."""
