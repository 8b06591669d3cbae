"""Which policies a trace can replay, and how exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtrace.cached import cached_layers, cached_requests, not_together
from kvtrace.errors import InputError
from kvtrace.holdings import Holdings
from kvtrace.model import Layer, number_text
from kvtrace.trace import Trace
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.signals import missing
from kvtrace_viewer.replay.when import When, parse_when

WHY = {
    "E0": "position alone decides: exact",
    "E1": "decides once, right after the prompt, from full-cache q, k, v: exact in every layer",
    "E2": "decides while decoding: exact in layer 0 and at the first eviction, "
    "then on the full-cache run's q, k, v",
    "E2s": "chooses per query what is read and evicts nothing: exact but for the drift of queries",
    "E3": "its scores were recorded: exact where the trace has them",
}
HOW = {
    "E0": "exactly",
    "E1": "exactly",
    "E2": "approximately",
    "E2s": "approximately",
    "E3": "exactly",
}


def replayable(trace: Trace) -> list[dict[str, str]]:
    """Return a row per policy.

    `policy`; `replay`, one of exactly, approximately (as a real run within what `exactness` says)
    and no; `exactness` as the policy decides in its paper, or `no`; and `reason`. A policy that
    cannot be replayed at its own rhythm but at another says which.
    """
    numbers = cached_requests(trace)
    held, layers = [trace.holdings(n) for n in numbers], cached_layers(trace, numbers)
    apart = not_together(trace, numbers)
    lacking = missing(trace, layers)
    found = [_row(layers, held, lacking, name, kind()) for name, kind in POLICIES.items()]
    for row in found if apart else ():
        row["reason"] += f"; with --request N, as {apart}"
    return found


def _row(
    layers: Sequence[Layer],
    held: Sequence[Holdings],
    lacking: Mapping[str, str],
    name: str,
    policy: Policy,
) -> dict[str, str]:
    problem = None
    for rhythm in dict.fromkeys((policy.default_when, "step", "prefill")):
        when = parse_when(rhythm)
        found = obstacle(layers, held, lacking, policy, when)
        if found is None:
            exactness = policy.exactness(when)
            reason = WHY[exactness] + (f", with --when {when} ({problem})" if problem else "")
            if policy.takes_received and not all(one.has_all_queries for one in held):
                reason += "; the prompt's attention comes from `received`"
            return _as_row(name, HOW[exactness], exactness, reason)
        problem = problem or found
    return _as_row(name, "no", "no", problem or "")


def _as_row(policy: str, replay: str, exactness: str, reason: str) -> dict[str, str]:
    return {"policy": policy, "replay": replay, "exactness": exactness, "reason": reason}


def obstacle(
    layers: Sequence[Layer],
    held: Sequence[Holdings],
    lacking: Mapping[str, str],
    policy: Policy,
    when: When,
) -> str | None:
    """Why `policy` cannot be replayed on the requests that `held` describes; None where it can.

    `lacking` are the signals beyond q, k, v that cannot be had, with the reason of each.

    Keys are needed whatever decides, in every replayed layer, and the queries of all rows that
    are measured: those after the first cut.
    """
    if any(layer.attention_kind == "bidirectional" for layer in layers):
        return "attention runs both ways, so there is no KV cache to evict from"
    if any(layer.position_bias is not None for layer in layers):
        return "the model adds a learned position bias to its scores, which replays do not know"
    kept = {kind for layer in layers_held(held) for kind in held[0].layers[layer]} if held else ()
    absent = [kind for kind in ("k", "q") if kind not in kept]
    if absent:
        return f"the trace lacks {', '.join(absent)}"
    if "lse" not in kept and any(layer.has_sinks for layer in layers):
        return "the model has learned sinks, and the trace lacks lse"
    if "v" in policy.signals and set(layers_held(held, "v")) != set(layers_held(held)):
        return "the trace lacks v in some layers"
    for signal in sorted(policy.signals & lacking.keys()):
        return lacking[signal]
    joint = policy.across_heads or policy.shares_heads
    if joint and any(layer.is_part for layer in layers):
        return "it decides from all heads of a layer, and only some were kept"
    return _query_obstacle(held, policy, when)


def layers_held(held: Sequence[Holdings], *kinds: str) -> list[int]:
    """Layers that hold the keys of every token of all requests, and `kinds` too."""
    found = [set(one.layers_with("k", *kinds)) for one in held]
    return sorted(set.intersection(*found)) if found else []


def layers_replayed(trace: Trace, requests: Sequence[int]) -> list[int]:
    """Layers that a replay of some requests covers: those whose keys the trace holds whole."""
    if "k" in trace.signals:
        return sorted({layer.layer for layer in trace.layers})
    return layers_held([trace.holdings(request) for request in requests])


def _query_obstacle(held: Sequence[Holdings], policy: Policy, when: When) -> str | None:
    partial = [one for one in held if not one.has_all_queries]
    if not partial:
        return None
    if not all(one.has_decoded_queries for one in partial):
        return "the trace lacks the queries of decoded tokens, which are what is measured"
    texts = ", ".join(dict.fromkeys(one.query_text for one in partial))
    kept = f"of the prompt's queries the trace kept {texts}"
    if when.in_prompt:
        return f"{when} cuts and measures inside the prompt, and {kept}"
    needed = policy.prompt_queries
    if needed is None and policy.takes_received:
        layers = layers_held(held)
        if all(set(layers) <= set(one.layers_with("received")) for one in partial):
            return None
        return f"it needs the attention of the whole prompt; {kept}, and no `received`"
    if needed is None:
        return f"it needs the attention of the whole prompt, and {kept}"
    if any(one.last_prompt_queries < min(needed, one.prompt_tokens) for one in partial):
        return f"it needs the last {needed} queries of the prompt, and {kept}"
    return None


def check(trace: Trace, requests: Sequence[int], policies: Sequence[tuple[Policy, When]]) -> None:
    """Refuse what cannot be replayed.

    Raises
    ------
    InputError
        With the reason.
    """
    if not trace.rows and trace.sql("from kv_events limit 1").num_rows:
        raise InputError(
            f"{trace.path} holds KV events and no tokens; a policy decides from queries and keys;"
            " record the model itself, with `kvtrace record`"
        )
    if not trace.rows or not requests:
        raise InputError(
            f"{trace.path} holds no tokens; a replay needs at least one; record a run first"
        )
    if apart := not_together(trace, requests):
        raise InputError(
            f"requests {number_text(sorted(requests))} of {trace.path} cannot be replayed together:"
            f" {apart}; one was expected; choose it with --request N"
        )
    held, layers = [trace.holdings(n) for n in requests], cached_layers(trace, requests)
    lacking = missing(trace, layers)
    for policy, when in policies:
        problem = obstacle(layers, held, lacking, policy, when)
        if problem:
            raise InputError(
                f"{policy.name} cannot be replayed on {trace.path} with --when {when}: {problem}; "
                "a decoder's trace with q and k of every row was expected; "
                "record it with --detail qk or qkv and --queries all, or see `kvtrace info`"
            )


def left_out(trace: Trace, requests: Sequence[int]) -> list[str]:
    """Which layers a replay of some requests leaves out, and why."""
    held = layers_held([trace.holdings(request) for request in requests])
    missing = sorted({s.layer for s in cached_layers(trace, requests)} - set(held))
    cross = {s.layer for r in requests for s in trace.layers_of(r) if s.is_cross}
    found = []
    if missing:
        text = number_text(missing)
        found.append(f"layers {text} are left out: the trace does not hold all their keys")
    if cross:
        text = number_text(sorted(cross))
        found.append(f"layers {text} are left out: cross attention, whose cache does not grow")
    return found
