"""What must hold for every policy, on synthetic heads that hypothesis chooses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import naive
from tests.reference.heads import attention, full_block, synthetic_head, with_signals

from kvtrace_viewer.replay import POLICIES, Head, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.kernels import NEVER
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.outputs import output_errors
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals

WHENS = ["prefill", "step", "every=3", "stream", "chunk=5"]
SELECTING = sorted(name for name, kind in POLICIES.items() if kind.selects)
EVICTING = sorted(set(POLICIES) - {"full", *SELECTING})
PROTECTIONS = st.sampled_from(["", ":sinks=3", ":recent=5", ":sinks=2,recent=30%"])

heads = st.builds(
    lambda seed, tokens, prompt, group, window: with_signals(
        replace(synthetic_head(seed, tokens, min(prompt, tokens), group), window=window)
    ),
    st.integers(0, 2**16),
    st.integers(2, 80),
    st.integers(0, 80),
    st.integers(1, 3),
    st.none() | st.integers(2, 40),
)
budgets = st.one_of(st.integers(1, 90).map(str), st.integers(1, 100).map("{}%".format))


def run(head: Head, policy: str, budget: str, when: str) -> tuple[HeadReplay, HeadTotals]:
    runs = [Run(parse_policy(policy), parse_when(when), [parse_budget(budget)])]
    with workers(1) as pool:
        (found,) = replay_layer([head], runs, Measures(), pool, lambda count: None)
    return found, found.summarise(StepTotals.zeros(1, head.tokens))


@settings(max_examples=60, deadline=None)
@given(heads, budgets, st.sampled_from(WHENS), st.sampled_from(EVICTING), PROTECTIONS)
def test_the_budget_is_never_exceeded_after_a_decision_and_protection_is_kept(
    head: Head, budget: str, when: str, policy: str, protection: str
) -> None:
    found, _ = run(head, policy + protection, budget, when)
    at = found.evicted_at[0]
    made = found.runs[0].cuts
    for c, row in enumerate(made.rows):
        held = np.flatnonzero(at[: row + 1] > row)
        limit = int(parse_budget(budget).limits(present(np.array([row]), head.window))[0])
        assert len(held) <= made.limits[c, 0] <= limit
        visible = held > row + 1 - head.window if head.window else np.ones(len(held), bool)
        assert visible.all()
        oldest_visible = row + 2 - head.window if head.window else 0
        newest = range(max(row + 1 - made.recent[c, 0], oldest_visible, 0), row + 1)
        assert set(newest) <= set(held)
        if not budget.endswith("%"):  # a growing budget protects more than it kept before
            first = range(max(oldest_visible, 0), min(made.sinks[c, 0], row + 1))
            assert set(first) <= set(held)
    joined = np.arange(head.tokens)
    assert (at >= joined).all(), "a token is visible to its own query"


@settings(max_examples=40, deadline=None)
@given(heads, budgets, st.sampled_from(WHENS))
def test_full_loses_nothing(head: Head, budget: str, when: str) -> None:
    found, totals = run(head, "full", budget, when)
    measured = np.isfinite(found.measures.mass)
    np.testing.assert_allclose(found.measures.mass[measured], 1, atol=1e-5)
    assert totals.misses[0] == totals.evictions[0] == totals.error[0] == 0
    assert totals.retained_sinks[0] == totals.sinks


@settings(max_examples=60, deadline=None)
@given(heads, budgets, st.sampled_from(WHENS), st.sampled_from(EVICTING))
def test_nothing_exceeds_the_bound_of_the_oracle(
    head: Head, budget: str, when: str, policy: str
) -> None:
    _, oracle = run(head, "oracle", budget, when)
    _, other = run(head, policy, budget, when)
    if other.masses[0]:
        assert other.mass[0] <= oracle.bound[0] + 1e-5 * other.masses[0]


@settings(max_examples=30, deadline=None)
@given(heads, budgets, st.sampled_from(WHENS), st.sampled_from(sorted(POLICIES)))
def test_equal_inputs_give_equal_bytes(head: Head, budget: str, when: str, policy: str) -> None:
    first, again = (run(head, policy, budget, when) for _ in range(2))
    for name in HeadTotals.__dataclass_fields__:
        a, b = (np.asarray(getattr(totals, name)) for _, totals in (first, again))
        assert a.tobytes() == b.tobytes(), name
    assert first[0].evicted_at.tobytes() == again[0].evicted_at.tobytes()


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("seed", range(12))
def test_brute_force_lies_between_the_schedule_and_the_bound(seed: int, when: str) -> None:
    tokens = 7 + seed % 4
    head = synthetic_head(seed, tokens, tokens // 2 if when != "every=3" else 2, 1 + seed % 2)
    budget = ["2", "3", "40%"][seed % 3]
    found, totals = run(head, "oracle", budget, when)
    best = brute_force(head, budget, when)
    assert totals.mass[0] <= best + 1e-5
    assert best <= totals.bound[0] + 1e-5
    if when == "prefill":
        assert totals.mass[0] == pytest.approx(best, abs=1e-5)
    assert found.evicted_at.shape == (1, tokens)


def brute_force(head: Head, budget: str, when: str) -> float:
    """The most mass any schedule of cuts keeps, by trying all of them."""
    a = attention(head).sum(axis=0, dtype=np.float64)
    cuts = naive.cut_rows(when, head.tokens, head.prompt_tokens)

    @cache
    def best(row: int, held: frozenset[int]) -> float:
        if row == head.tokens:
            return 0.0
        visible = held | {row}
        gain = sum(a[row, j] for j in visible) if cuts and row > cuts[0] else 0.0
        if row not in cuts:
            return float(gain) + best(row + 1, visible)
        limit = min(naive.budget_of(budget, row + 1), len(visible))
        choices = itertools.combinations(sorted(visible), limit)
        return float(gain) + max(best(row + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


def test_identity_of_the_output_error() -> None:
    """o_S - o = (1 - m)(o_S - o_E), o_E over the evicted keys."""
    head = synthetic_head(9, 50, 30)
    block = full_block(head)
    assert head.v is not None
    gone = np.full((1, 50), NEVER, dtype=np.int32)
    gone[0, [3, 8, 9, 20, 21, 22]] = 29
    rows = np.arange(30, 50)
    errors = output_errors(block, gone, np.array([0]), rows)[0]
    a = block.attention[:, rows].astype(np.float64)
    kept = a * (gone[0] == NEVER)
    m = kept.sum(axis=2, keepdims=True)
    o, o_s, o_e = a @ head.v, kept @ head.v / m, (a - kept) @ head.v / (1 - m)
    np.testing.assert_allclose(o_s - o, (1 - m) * (o_s - o_e), atol=1e-6)
    want = np.linalg.norm((1 - m) * (o_s - o_e), axis=2) / np.linalg.norm(o, axis=2)
    np.testing.assert_allclose(errors, want, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_output_errors_of_many_pairs_are_those_of_each_row_alone(window: int | None) -> None:
    """Sets of holders, rows in several products, and what goes between two rows."""
    head = replace(synthetic_head(9, 60, 20), window=window)
    block = full_block(head)
    assert head.v is not None
    rng = np.random.default_rng(5)
    gone = np.where(rng.random((11, 60)) < 0.7, rng.integers(0, 60, (11, 60)), NEVER)
    gone = np.maximum(gone, np.arange(60)).astype(np.int32)
    pairs, rows = np.delete(np.arange(11), 4), np.arange(21, 60, 2)
    errors = output_errors(block, gone, pairs, rows)
    a = block.attention[:, rows].astype(np.float64)
    full = a @ head.v
    for p, line in zip(pairs, errors, strict=True):
        kept = a * (gone[p] >= rows[:, None])
        want = kept @ head.v / kept.sum(axis=2, keepdims=True) - full
        want = np.linalg.norm(want, axis=2) / np.linalg.norm(full, axis=2)
        np.testing.assert_allclose(line, want, rtol=1e-5, atol=1e-6)
