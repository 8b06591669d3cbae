"""Decisions that need more than one head: shared budgets, surveys of all layers, selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.reference.heads import attention, random_weights_heads, synthetic_head

from kvtrace.testing import SyntheticTrace
from kvtrace_viewer.replay import (
    Block,
    Budget,
    Cache,
    Cuts,
    Head,
    Measures,
    Policy,
    Selector,
    parse_budget,
    parse_when,
    replay,
)
from kvtrace_viewer.replay.amounts import parse_amount
from kvtrace_viewer.replay.cache import present
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.totals import StepTotals

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]
THREE = parse_amount("3", "recent", "recent=3")


def received(block: Block, cuts: Cuts, state: Doubles) -> Doubles:
    """Accumulated attention after each cut."""
    sums = block.received.cumsum(axis=0) + state[: block.stop]
    state[: block.stop] = sums[-1]
    return sums[cuts.rows - block.start]


@dataclass(frozen=True, kw_only=True)
class Shared(Policy):
    """A policy of the test: the best of all heads together."""

    name: ClassVar[str] = "shared"
    shares_heads: ClassVar[bool] = True
    default_when: ClassVar[str] = "prefill"

    def start(self, head: Head, cuts: Cuts) -> Doubles:
        """[token]."""
        return np.zeros(head.tokens)

    def scores(self, block: Block, cuts: Cuts, state: Doubles) -> Doubles:
        """Accumulated attention."""
        return received(block, cuts, state)

    def allocate(self, scores: list[Doubles], limits: Longs) -> Longs:
        """As many as a head has among the best."""
        least = np.sort(np.concatenate(scores))[-limits.sum()]
        return np.array([(one >= least).sum() for one in scores])


@dataclass(frozen=True, kw_only=True)
class Surveyed(Policy):
    """A policy of the test: a layer keeps as many tokens as its number, and one."""

    name: ClassVar[str] = "surveyed"
    surveys: ClassVar[bool] = True
    default_when: ClassVar[str] = "prefill"

    def survey(self, heads: Sequence[Head], cuts: Longs) -> int:
        """The layer."""
        assert heads[0].attention(0, 2).shape == (heads[0].group, 2, 2)
        return heads[0].layer + 1

    def limits(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """Its own number, where all layers were seen."""
        found = head.surveys[self.spec]
        assert sum(found.values()) == head.num_layers * (head.num_layers + 1) // 2
        return np.full(len(rows), found[head.layer])

    def scores(self, block: Block, cuts: Cuts, state: Any) -> Doubles:
        """Position."""
        return np.broadcast_to(np.arange(block.stop, dtype=float), (len(cuts.rows), block.stop))


@dataclass(frozen=True, kw_only=True)
class Best(Selector):
    """A policy of the test: every query reads the keys it attends to most."""

    name: ClassVar[str] = "best"

    def select(
        self, block: Block, rows: Longs, limits: Longs, cache: Cache, state: Any
    ) -> NDArray[np.bool_]:
        """The best of the group's sum."""
        out = np.zeros((limits.shape[1], len(rows), block.stop), np.bool_)
        for r, row in enumerate(rows):
            order = np.argsort(-block.received[row - block.start, :row], kind="stable")
            for b in range(limits.shape[1]):
                out[b, r, order[: limits[r, b]]] = True
        return out


def run(heads: list[Head], policy: Policy, budgets: list[str], when: str) -> list[HeadReplay]:
    runs = [Run(policy, parse_when(when), [parse_budget(b) for b in budgets])]
    with workers(2) as pool:
        return replay_layer(heads, runs, Measures(), pool, lambda count: None)


@pytest.mark.parametrize("when", ["prefill", "step"])
def test_heads_share_one_budget(when: str) -> None:
    heads = random_weights_heads()
    replays = run(heads, Shared(), ["25%", "9"], when)
    sums = [attention(head)[:, :40].sum(axis=(0, 1), dtype=np.float64)[:40] for head in heads]
    for b, per_head in enumerate((10, 9)):
        best = np.sort(np.concatenate(sums))[-2 * per_head]
        for found, want in zip(replays, sums, strict=True):
            held = np.flatnonzero(found.evicted_at[b, :40] > 39)
            assert held.tolist() == np.flatnonzero(want >= best).tolist()
        for c, row in enumerate(replays[0].runs[0].cuts.rows):
            there = sum((one.evicted_at[b, : row + 1] > row).sum() for one in replays)
            allotted = sum(one.runs[0].cuts.limits[c, b] for one in replays)
            assert there == allotted <= 2 * (per_head if b else (row + 1) // 4)
    assert {len(np.unique(one.runs[0].cuts.limits[0])) for one in replays} != {1}


def test_protection_stays_where_budgets_are_shared() -> None:
    heads = random_weights_heads()
    for found in run(heads, Shared(sinks=2, recent=THREE), ["8"], "step"):
        for row in range(39, 72):
            held = np.flatnonzero(found.evicted_at[0, : row + 1] > row).tolist()
            assert {0, 1, row - 2, row - 1, row} <= set(held)


def test_budgets_can_depend_on_every_layer(synthetic_trace: SyntheticTrace) -> None:
    trace = synthetic_trace(steps=[40] + [1] * 5)
    result = replay(trace, [Surveyed(), "h2o"], ["50%"], store=False)[0]
    for layer, heads in result.kept().items():
        for kept in heads.values():
            assert kept.tolist() == [*range(39 - layer, 40)]


def test_a_selector_reads_less_than_is_held() -> None:
    head = synthetic_head(2, 90, 50)
    (found,) = run([head], Best(), ["20%", "7"], "step")
    totals = found.summarise(StepTotals.zeros(2, 90))
    assert totals.evictions.tolist() == [0, 0]
    a = attention(head)
    for b in range(2):
        for row in range(50, 90):
            limit = 7 if b else max(1, int(present(np.array([row - 1]), None)[0]) // 5)
            order = np.argsort(-a[:, row, :row].sum(axis=0, dtype=np.float64), kind="stable")
            read = [*order[:limit], row]
            np.testing.assert_allclose(
                found.measures.mass[b, :, row], a[:, row, read].sum(axis=1), atol=1e-6
            )
            needed = a[:, row, : row + 1] >= 1 / (row + 1)
            assert found.measures.hits[b, row] == needed[:, read].sum()
            assert found.measures.misses[b, row] == needed.sum() - needed[:, read].sum()
        assert 0 < totals.error[b] / totals.errors[b] < 1
    assert Best().exactness(parse_when("step")) == "E2s"


def test_a_selector_that_reads_all_loses_nothing() -> None:
    (found,) = run([synthetic_head(2, 90, 50)], Best(), ["100%"], "step")
    totals = found.summarise(StepTotals.zeros(1, 90))
    assert totals.misses[0] == 0
    assert totals.error[0] == 0
    np.testing.assert_allclose(totals.mass[0] / totals.masses[0], 1, atol=1e-6)
