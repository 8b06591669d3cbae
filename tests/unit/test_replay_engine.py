"""The engine equals the naive step-by-step replay in every eviction, hit and mass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.reference import naive, naive_more
from tests.reference.heads import (
    attention,
    kvpress_heads,
    random_weights_heads,
    synthetic_head,
    with_lse,
    with_signals,
)

from kvtrace_viewer.replay import POLICIES, Head, Measures, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.kernels import NEVER
from kvtrace_viewer.replay.totals import StepTotals

BUDGETS = ["10%", "25%", "60%", "7", "30"]
WHENS = ["prefill", "step", "every=5", "stream", "chunk=11"]
Specs = dict[str, tuple[str, dict[str, Any], dict[str, Any]]]

SLOW = set(naive_more.MORE_SCORES)
PLAIN: Specs = {
    **{name: (name, naive.PROTECTION.get(name, {}), {}) for name in POLICIES if name != "rocketkv"},
    "h2o:renormalise=false": ("h2o", {"recent": "50%"}, {"renormalise": False}),
    "lru:sinks=2,recent=3": ("lru", {"sinks": 2, "recent": "3"}, {}),
    "sliding_window:sinks=9,recent=40%": ("sliding_window", {"sinks": 9, "recent": "40%"}, {}),
    "oracle:prices=5,recent=2": ("oracle", {"recent": "2"}, {"prices": 5}),
    "snapkv:window=6,kernel=3": ("snapkv", {"recent": "6"}, {"window": 6, "kernel": 3}),
    "snapkv:window=4,pool=max,sinks=1": (
        "snapkv",
        {"recent": "4", "sinks": 1},
        {"window": 4, "pool": "max"},
    ),
    "block_keydiff:block=5": ("block_keydiff", {}, {"block": 5}),
    "lagkv:lag=9": ("lagkv", {"sinks": 4}, {"lag": 9}),
    "random:seed=3": ("random", {}, {"seed": 3}),
}
"""Compared at every budget, under every circumstance."""

COMPOSITE: Specs = {
    **{
        name: (name, naive.PROTECTION.get(name, {}), {})
        for name in SLOW - {"expected_attention", "rocketkv"}
    },
    "scissorhands:history=7,recent=2,drop=20%": (
        "scissorhands",
        {"recent": "2"},
        {"history": 7, "drop": "20%"},
    ),
    "keyformer:seed=4": ("keyformer", {"recent": "30%"}, {"seed": 4}),
    "nacl:proxies=5": ("nacl", {"recent": "5"}, {"proxies": 5}),
    "cake:window=6": ("cake", {"recent": "6"}, {"window": 6}),
    "expected_attention:future=9": ("expected_attention", {"sinks": 4}, {"future": 9}),
    "adakv:window=6": ("adakv", {"recent": "6"}, {"window": 6}),
    "adakv:window=4,alpha=0.6,sinks=2": (
        "adakv",
        {"recent": "4", "sinks": 2},
        {"window": 4, "alpha": 0.6},
    ),
    "criticalkv:window=6": ("criticalkv", {"recent": "6"}, {"window": 6}),
    "chunkkv:window=6,chunk=4": ("chunkkv", {"recent": "6"}, {"window": 6, "chunk": 4}),
    "defensivekv:window=6": ("defensivekv", {"recent": "6"}, {"window": 6}),
    "quest:page=4": ("quest", {}, {"page": 4}),
    # A kernel as wide as the text would make scores that only rounding tells apart.
    "rocketkv:window=6,kernel=3,page=4": (
        "rocketkv",
        {"recent": "6"},
        {"window": 6, "kernel": 3, "page": 4},
    ),
}
"""Those whose naive replay is slow, or needs the heads of a layer."""


def engine(heads: list[Head], specs: list[str], budgets: list[str], when: str) -> list[HeadReplay]:
    runs = [
        Run(parse_policy(s), parse_when(when), [parse_budget(b) for b in budgets]) for s in specs
    ]
    with workers(2) as pool:
        return replay_layer(heads, runs, Measures(), pool, lambda count: None)


def compare(heads: list[Head], specs: Specs, when: str, budgets: list[str] = BUDGETS) -> None:
    heads = [with_signals(head) for head in heads]
    maps = [attention(head) for head in heads]
    shares = [sink_share(head, a) for head, a in zip(heads, maps, strict=True)]
    inputs = [inputs_of(head, maps, shares) for head in heads]
    replays = engine(heads, list(specs), budgets, when)
    totals = [
        found.summarise(StepTotals.zeros(len(specs) * len(budgets), heads[0].tokens))
        for found in replays
    ]
    for s, spec in enumerate(specs):
        name, protection, options = specs[spec]
        for b, budget in enumerate(budgets):
            wanted = naive.replay_layer(
                list(maps),
                name,
                budget,
                when,
                heads[0].prompt_tokens,
                window=heads[0].window,
                sink_shares=list(shares),
                heads=inputs,
                options=options,
                **protection,
            )
            for found, total, want in zip(replays, totals, wanted, strict=True):
                check(found, total, s * len(budgets) + b, want, f"{spec}@{budget}/{when}")


def inputs_of(head: Head, maps: Any, shares: Any) -> dict[str, Any]:
    """What a naive policy may look at beside its own map."""
    names = ("q", "k", "v", "q_prerope", "inv_freq", "wo", "score", "scale")
    found = {name: getattr(head, name) for name in names}
    found |= {"layer": maps, "layer_shares": shares, "prompt": head.prompt_tokens}
    return found | {"where": (head.layer, head.kv_head)}


def sink_share(head: Head, a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a learned sink takes of each row."""
    sums = a.sum(axis=2, dtype=np.float64)
    return np.maximum(1 - sums, 0) if head.has_sinks else np.zeros_like(sums)


def check(found: HeadReplay, totals: Any, p: int, want: naive.Naive, where: str) -> None:
    at = found.evicted_at[p]
    got = {int(j): int(at[j]) for j in np.flatnonzero(at != NEVER)}
    assert got == want.evicted_at, where
    assert totals.evictions[p] == want.evictions, where
    rows = sorted(want.mass)
    measures = found.measures
    assert np.flatnonzero(np.isfinite(measures.mass[p, 0])).tolist() == rows, where
    assert measures.hits[p, rows].tolist() == [want.hits[i] for i in rows], where
    assert measures.misses[p, rows].tolist() == [want.misses[i] for i in rows], where
    masses = np.array([want.mass[i] for i in rows]).reshape(len(rows), found.head.group)
    np.testing.assert_allclose(measures.mass[p][:, rows].T, masses, atol=1e-6, err_msg=where)
    assert totals.ties[p] == want.ties, where
    if want.bound is not None:
        np.testing.assert_allclose(totals.bound[p], want.bound, rtol=1e-9, err_msg=where)


@pytest.mark.parametrize("when", WHENS)
def test_equals_naive_on_a_random_weights_run(when: str) -> None:
    compare(random_weights_heads(), PLAIN, when)


@pytest.mark.parametrize("when", ["prefill", "step", "every=8"])
def test_equals_naive_on_kvpress_a(when: str) -> None:
    compare(kvpress_heads(1), PLAIN, when)


@pytest.mark.parametrize("when", WHENS)
def test_equals_naive_under_window_softcap_and_learned_sink(when: str) -> None:
    head = synthetic_head(3, 90, 70)
    for changed in (
        replace(head, window=20),
        with_lse(replace(head, softcap=1.5)),
        with_lse(head, learned_sink=2.0),
        with_lse(replace(head, window=33), learned_sink=1.0),
    ):
        compare([changed], PLAIN, when)


@pytest.mark.parametrize("when", WHENS)
def test_composite_policies_equal_naive(when: str) -> None:
    compare(random_weights_heads(), COMPOSITE, when, ["25%", "9"])
    if when in ("prefill", "step"):
        head = synthetic_head(3, 60, 45)
        for changed in (replace(head, window=20), with_lse(head, learned_sink=2.0)):
            compare([changed], COMPOSITE, when, ["30%"])


@pytest.mark.parametrize("prompt", [0, 1, 30])
def test_composite_policies_equal_naive_wherever_the_prompt_ends(prompt: int) -> None:
    for when in ("prefill", "every=5"):
        compare([synthetic_head(4, 30, prompt)], COMPOSITE, when, ["7"])


@pytest.mark.parametrize("prompt", [0, 1, 64, 65, 90])
def test_equals_naive_wherever_the_prompt_ends(prompt: int) -> None:
    for when in WHENS:
        compare([synthetic_head(4, 90, prompt)], PLAIN, when)


def test_alibi_is_in_the_scores() -> None:
    slopes = np.array([0.25, 0.01], np.float32)
    head = replace(synthetic_head(1, 150, 100), alibi_slopes=slopes)
    positions = np.arange(150)
    scores = np.einsum("igd,jd->gij", head.q.astype(float), head.k.astype(float)) * head.scale
    scores += slopes[:, None, None] * positions
    scores[:, positions[:, None] < positions] = -np.inf
    want = np.exp(scores - scores.max(axis=2, keepdims=True))
    want /= want.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(attention(head), want, atol=1e-6)


def test_attention_is_the_softmax_of_the_scores() -> None:
    head = with_lse(replace(synthetic_head(1, 150, 100), softcap=2.0, window=70), 0.5)
    scores = np.einsum("igd,jd->gij", head.q.astype(float), head.k.astype(float)) * head.scale
    scores = np.exp(2.0 * np.tanh(scores / 2.0))
    distance = np.subtract.outer(np.arange(150), np.arange(150))
    scores[:, (distance < 0) | (distance >= 70)] = 0
    want = scores / (scores.sum(axis=2, keepdims=True) + np.exp(0.5))
    np.testing.assert_allclose(attention(head), want, atol=2e-6)
    np.testing.assert_allclose(attention(replace(head, lse=None)).sum(axis=2), 1, atol=1e-5)
