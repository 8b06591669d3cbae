"""What heads that share their budgets can retain: bounded, on synthetic heads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.reference import naive
from tests.reference.heads import attention, synthetic_head, with_signals

from kvtrace_viewer.replay import Budget, Head, Policy, parse_budget, parse_policy, parse_when
from kvtrace_viewer.replay.bounds import MovingBounds, bound_together
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.policies.snapkv import SnapKV
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals

WHENS = ["prefill", "step", "every=3", "stream", "chunk=5"]


def some_heads(seed: int, tokens: int, prompt: int, groups: list[int]) -> list[Head]:
    """Heads that differ in how sharply they attend, and so in what a slot is worth to them."""
    return [
        with_signals(
            replace(
                synthetic_head(seed + h, tokens, min(prompt, tokens), group),
                kv_head=h,
                scale=0.2 + 0.8 * h,
            )
        )
        for h, group in enumerate(groups)
    ]


def run(heads: list[Head], policy: Policy, budget: str, when: str) -> list[HeadReplay]:
    runs = [Run(policy, parse_when(when), [parse_budget(budget)])]
    with workers(1) as pool:
        return replay_layer(heads, runs, Measures(), pool, lambda count: None)


def totals(found: list[HeadReplay]) -> list[HeadTotals]:
    return [one.summarise(StepTotals.zeros(1, one.head.tokens)) for one in found]


def together(found: list[HeadReplay]) -> float:
    return float(bound_together([one.runs[0].foreseen() for one in found])[0])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**16),
    st.integers(4, 60),
    st.integers(1, 60),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.one_of(st.integers(1, 40).map(str), st.integers(1, 100).map("{}%".format)),
    st.sampled_from(WHENS),
    st.sampled_from(["adakv:alpha=0", "adakv:base=tova,alpha=0", "defensivekv", "kvzip", "oracle"]),
)
def test_no_policy_exceeds_the_bound_over_heads_that_share(
    seed: int, tokens: int, prompt: int, groups: list[int], budget: str, when: str, policy: str
) -> None:
    heads = some_heads(seed, tokens, prompt, groups)
    known = run(heads, parse_policy("oracle"), budget, when)
    if not len(known[0].runs[0].cuts.rows):
        return
    bound = together(known)
    mine = totals(run(heads, parse_policy(policy), budget, when))
    assert sum(one.mass[0] for one in mine) <= bound + 1e-5 * sum(one.masses[0] for one in mine)
    equal = sum(one.bound[0] for one in totals(known))
    assert equal <= bound * (1 + 1e-12)
    if len(groups) == 1:
        assert bound == pytest.approx(equal, rel=1e-12)


@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("seed", range(6))
def test_brute_force_lies_between_the_schedule_and_the_bound(seed: int, when: str) -> None:
    tokens = 6 + seed % 2
    groups = [1 + seed % 2, 1 + seed % 3]
    heads = some_heads(seed, tokens, 3 if when != "every=3" else 2, groups)
    budget = ["1", "2", "40%"][seed % 3]
    known = run(heads, parse_policy("oracle"), budget, when)
    best = brute_force(heads, budget, when)
    assert sum(one.mass[0] for one in totals(known)) <= best + 1e-5
    assert best <= together(known) + 1e-5
    if when == "prefill":
        assert best == pytest.approx(together(known), abs=1e-5)


def brute_force(heads: list[Head], budget: str, when: str) -> float:
    """The most mass that two heads keep in sum, whoever has the slots: all schedules tried."""
    maps = [attention(head).sum(axis=0, dtype=np.float64) for head in heads]
    tokens = heads[0].tokens
    cuts = naive.cut_rows(when, tokens, heads[0].prompt_tokens)

    @cache
    def best(row: int, held: frozenset[tuple[int, int]]) -> float:
        if row == tokens:
            return 0.0
        visible = held | {(h, row) for h in range(len(heads))}
        measured = bool(cuts) and row > cuts[0]
        gain = sum(float(maps[h][row, j]) for h, j in visible) if measured else 0.0
        if row not in cuts:
            return gain + best(row + 1, visible)
        limit = min(len(heads) * naive.budget_of(budget, row + 1), len(visible))
        choices = itertools.combinations(sorted(visible), limit)
        return gain + max(best(row + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


@dataclass(frozen=True, kw_only=True)
class Greedy(SnapKV):
    """A policy of the test: head 0 has more than its budget, and nobody less."""

    name: ClassVar[str] = "greedy"

    def limits(self, budget: Budget, rows: NDArray[np.int64], head: Head) -> NDArray[np.int64]:
        """One more."""
        return super().limits(budget, rows, head) + (head.kv_head == 0)


@pytest.mark.parametrize(("budget", "beyond"), [("5", True), ("100%", False)])
def test_taking_more_than_the_budgets_sum_is_seen(budget: str, beyond: bool) -> None:
    bounds = MovingBounds(1)
    found = run(some_heads(1, 20, 10, [1, 1]), Greedy(window=2), budget, "step")
    bounds.add(0, found)
    bounds.end_request()
    assert bounds.beyond[0] == beyond
    assert np.isnan(bounds.of_model[0])


@pytest.mark.parametrize("budget", ["1", "2", "3%", "30%"])
@pytest.mark.parametrize("windows", [(None, None, None), (None, 6, 9)])
def test_shares_of_layers_and_heads_are_no_more_than_the_whole(
    budget: str, windows: tuple[int | None, ...]
) -> None:
    """Also where some share is less than a token, and where layers have windows."""
    rows, amount = np.array([11, 30, 63]), parse_budget(budget)
    cake = parse_policy("cake")
    surveys = {cake.spec: dict(enumerate(zip((5.0, 0.01, 0.0), windows, strict=True)))}
    heads = [
        replace(synthetic_head(0, 64, 20), layer=n, num_layers=3, window=window, surveys=surveys)
        for n, window in enumerate(windows)
    ]
    own = np.sum([cake.limits(amount, rows, head) for head in heads], axis=0)
    even = np.sum([Policy.limits(cake, amount, rows, head) for head in heads], axis=0)
    assert (own <= even).all()
    assert min(int(cake.limits(amount, rows, head).min()) for head in heads) >= 1


@pytest.mark.parametrize("budget", ["1", "2", "5", "30%"])
def test_a_table_divides_no_more_than_the_whole(budget: str, tmp_path: Path) -> None:
    table = tmp_path / "heads.json"
    table.write_text("[[9, 0], [0.01, 0]]")
    headkv, rows = parse_policy(f"headkv:table={table}"), np.array([11, 30, 63])
    heads = [replace(synthetic_head(0, 64, 20), layer=n // 2, kv_head=n % 2) for n in range(4)]
    own = [headkv.limits(parse_budget(budget), rows, head) for head in heads]
    assert (np.sum(own, axis=0) <= 4 * parse_budget(budget).limits(rows + 1)).all()
    assert np.min(own) >= 1
