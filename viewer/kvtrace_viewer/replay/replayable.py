"""Which policies a trace can replay, and how exactly."""

from __future__ import annotations

from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.when import parse_when

WHY = {
    "E0": "position alone decides: exact",
    "E1": "decides once, right after the prompt, from full-cache q, k, v: exact in every layer",
    "E2": "decides while decoding: exact in layer 0 and at the first eviction, "
    "then on the full-cache run's q, k, v",
}


def replayable(trace: Trace) -> list[dict[str, str]]:
    """Return a row per policy: `policy`, `exactness` (as it decides in its paper) and `reason`.

    Where the trace lacks what the policy needs, exactness is `no` and the reason says why.
    """
    found = []
    signals = trace.signals
    for name, kind in POLICIES.items():
        problem = obstacle(trace, signals, kind())
        exactness = kind().exactness(parse_when(kind.default_when))
        found.append(
            {
                "policy": name,
                "exactness": "no" if problem else exactness,
                "reason": problem or WHY[exactness],
            }
        )
    return found


def obstacle(trace: Trace, signals: frozenset[str], policy: Policy) -> str | None:
    """Why `policy` cannot be replayed on this trace; None where it can.

    `signals` are the trace's, which are costly to ask for. Retained mass and hits need every
    attention row, so q and k are needed whatever decides.
    """
    missing = sorted((policy.signals | {"q", "k"}) - signals)
    if missing:
        return f"the trace lacks {', '.join(missing)} for some rows"
    if any(layer.attention_kind == "bidirectional" for layer in trace.layers):
        return "attention runs both ways, so there is no KV cache to evict from"
    if "lse" not in signals and any(layer.has_sinks for layer in trace.layers):
        return "the model has learned sinks, and the trace lacks lse"
    return None


def check(trace: Trace, policies: list[Policy]) -> None:
    """Refuse what cannot be replayed.

    Raises
    ------
    InputError
        With the reason.
    """
    if not trace.rows or not trace.requests():
        raise InputError(
            f"{trace.path} holds no tokens; a replay needs at least one; record a run first"
        )
    signals = trace.signals
    for policy in policies:
        problem = obstacle(trace, signals, policy)
        if problem:
            raise InputError(
                f"{policy.name} cannot be replayed on {trace.path}: {problem}; "
                "a decoder's trace with q and k of every row was expected; "
                "record it with --detail qk or qkv"
            )
