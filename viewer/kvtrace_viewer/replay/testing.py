"""The conformance kit: what every policy must do, as a pytest class to inherit.

>>> class TestMine(PolicyConformance):          # doctest: +SKIP
...     policy = "my_policy.py:Mine"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtrace_viewer.replay.amounts import parse_budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.engine import HeadReplay, Run, replay_layer, workers
from kvtrace_viewer.replay.kernels import NEVER
from kvtrace_viewer.replay.measure import Measures
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.signals import rotate
from kvtrace_viewer.replay.spec import idea, parse_policy
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals
from kvtrace_viewer.replay.when import parse_when

WHENS = ("prefill", "step", "every=3", "stream", "chunk=5")
BUDGETS = ("25%", "1", "9", "60%")
TOKENS, PROMPT = 90, 60


def synthetic_heads(seed: int = 0, window: int | None = None) -> list[Head]:
    """Two synthetic KV heads of one layer: seeded random arrays with every signal.

    A few keys draw attention; they are no model's.
    """
    rng = np.random.default_rng(seed)
    inv_freq = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    heads = []
    for kv_head in range(2):
        q = rng.normal(size=(TOKENS, 2, 8)).astype(np.float32)
        k = rng.normal(size=(TOKENS, 8)).astype(np.float32)
        k[rng.integers(0, TOKENS, 3)] *= 3
        heads.append(
            Head(
                q=q,
                k=k,
                v=rng.normal(size=(TOKENS, 8)).astype(np.float32),
                lse=None,
                scale=0.5,
                prompt_tokens=PROMPT,
                window=window,
                kv_head=kv_head,
                q_prerope=rotate(q, -np.arange(TOKENS), inv_freq).astype(np.float32),
                inv_freq=inv_freq,
                wo=rng.normal(size=(2, 16, 8)).astype(np.float32),
                score=rng.normal(size=TOKENS).astype(np.float32),
            )
        )
    return heads


class PolicyConformance:
    """What must hold for a policy, whatever it keeps.

    Attributes
    ----------
    policy : str, Policy or Policy class
        As `--policy` takes it, or the policy itself.
    whens : sequence of str
        Rhythms it is tried at.
    """

    policy: ClassVar[str | Policy | type[Policy]]
    whens: ClassVar[Sequence[str]] = WHENS

    def made(self, **changed: Any) -> Policy:
        """Make the policy, some parameters changed."""
        found = self.policy() if isinstance(self.policy, type) else parse_policy(self.policy)
        return replace(found, **changed)

    def replayed(
        self,
        policy: Policy,
        when: str,
        budgets: Sequence[str] = BUDGETS,
        window: int | None = None,
    ) -> list[HeadReplay]:
        """Replay the synthetic heads."""
        run = Run(policy, parse_when(when), [parse_budget(budget) for budget in budgets])
        heads = synthetic_heads(window=window)
        if policy.surveys:
            found = {0: policy.survey(heads, run.when.cuts(TOKENS, PROMPT))}
            heads = [replace(head, surveys={policy.spec: found}) for head in heads]
        with workers(1) as pool:
            return replay_layer(heads, [run], Measures(), pool, lambda count: None)

    def test_it_says_what_it_is(self) -> None:
        """A name, an idea, and parameters with a meaning, that its spec gives back."""
        policy = self.made()
        assert policy.name
        assert idea(type(policy))
        assert all(key.isidentifier() for key in policy.parameters())
        parse_when(policy.default_when)
        assert policy.exactness(parse_when("prefill")) in ("E0", "E1", "E2", "E2s", "E3")

    def test_the_budget_is_never_exceeded_after_a_decision(self) -> None:
        """Per layer: heads may share. What is stored by a selector is limited by `limits`."""
        for when in self.whens:
            for window in (None, 24):
                replays = self.replayed(self.made(), when, window=window)
                for b, budget in enumerate(BUDGETS):
                    for row in replays[0].runs[0].cuts.rows:
                        held = sum(int((r.evicted_at[b, : row + 1] > row).sum()) for r in replays)
                        assert held <= self.most(replays, budget, int(row)), (when, budget, row)

    def most(self, replays: list[HeadReplay], budget: str, row: int) -> int:
        """Tokens that the heads may hold together after a decision."""
        policy, rows = replays[0].runs[0].policy, np.array([row])
        limits = [policy.limits(parse_budget(budget), rows, found.head) for found in replays]
        return int(np.sum(limits))

    def test_a_query_sees_its_own_token(self) -> None:
        """No token is gone before its own row."""
        for when in self.whens:
            for found in self.replayed(self.made(), when):
                assert (found.evicted_at >= np.arange(TOKENS)).all()

    def test_protected_tokens_stay(self) -> None:
        """The first `sinks` and the last `recent` tokens, where the budget has room for them."""
        policy = self.made(sinks=2, recent="3")
        for when in self.whens:
            for found in self.replayed(policy, when, ["30"]):
                for row in found.runs[0].cuts.rows:
                    held = np.flatnonzero(found.evicted_at[0, : row + 1] > row)
                    wanted = {0, 1, *range(row - 2, row + 1)} & set(range(row + 1))
                    assert wanted <= set(held.tolist()), (when, row)

    def test_nothing_is_lost_where_the_budget_holds_everything(self) -> None:
        """A budget of 100% evicts nothing and keeps all of the mass."""
        for when in self.whens:
            for found in self.replayed(self.made(), when, ["100%"]):
                assert (found.evicted_at == NEVER).all()
                total = totals(found)
                assert total.misses[0] == 0
                np.testing.assert_allclose(total.mass[0], total.masses[0], rtol=1e-5)

    def test_no_more_is_kept_than_the_oracle_says_is_possible(self) -> None:
        """Retained mass stays under the oracle's bound, over what the policy may store.

        Heads that share a budget are bounded by none of their own: they are left out, and so are
        policies that choose per query, whose budget is not over what is stored.
        """
        policy = self.made()
        if policy.selects or policy.shares_heads:
            pytest.skip("the oracle's bound is over a budget that each head stores")
        for when in self.whens:
            bounds = self.replayed(parse_policy("oracle"), when)
            for found, oracle in zip(self.replayed(policy, when), bounds, strict=True):
                total, limit = totals(found), totals(oracle).bound
                if policy.name != "full":
                    assert (total.mass <= limit + 1e-5 * total.masses).all(), when

    def test_equal_inputs_give_equal_bytes(self) -> None:
        """Twice the same, to the bit."""
        for when in self.whens:
            first, again = (self.replayed(self.made(), when) for _ in range(2))
            for one, other in zip(first, again, strict=True):
                assert one.evicted_at.tobytes() == other.evicted_at.tobytes()
                assert one.measures.mass.tobytes() == other.measures.mass.tobytes()

    def test_budgets_do_not_depend_on_each_other(self) -> None:
        """A budget alone gives what it gives among others: state is not shared by mistake."""
        for when in self.whens:
            together = self.replayed(self.made(), when)
            for b, budget in enumerate(BUDGETS):
                alone = self.replayed(self.made(), when, [budget])
                for one, other in zip(together, alone, strict=True):
                    assert one.evicted_at[b].tobytes() == other.evicted_at[0].tobytes(), budget

    def test_it_is_what_it_would_be_one_row_at_a_time(self) -> None:
        """Decisions do not depend on how rows come in blocks, and are the lowest scores."""
        policy = self.made()
        if policy.shares_heads or policy.across_heads or policy.looks_ahead or policy.surveys:
            pytest.skip("this head cannot be replayed alone")
        for when in self.whens:
            for found in self.replayed(policy, when):
                want = row_by_row(policy, when, found.head)
                assert found.evicted_at.tobytes() == want.tobytes(), when


def totals(found: HeadReplay) -> HeadTotals:
    """What one head comes to."""
    return found.summarise(StepTotals.zeros(len(found.evicted_at), TOKENS))


def row_by_row(policy: Policy, when: str, head: Head) -> NDArray[np.int32]:
    """Replay one head in blocks of one row: evicted_at [budget, token]."""
    cuts = policy.cuts(parse_when(when), [parse_budget(b) for b in BUDGETS], head)
    evicted_at = np.empty((len(BUDGETS), TOKENS), dtype=np.int32)
    cache = Cache(cuts, head.window, evicted_at)
    state = policy.start(head, cuts)
    for row in range(TOKENS):
        block = Block(head, row, row + 1, head.attention(row, row + 1))
        policy.decide(block, cuts.within(row, row + 1), state, cache)
    return evicted_at
