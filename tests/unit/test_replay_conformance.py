"""Every policy of ours passes the conformance kit, which fails policies that err."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtrace_viewer.replay import POLICIES, Block, Cache, Cuts, Head, Policy
from kvtrace_viewer.replay.testing import PolicyConformance

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "my_policy.py"


class TestExample(PolicyConformance):
    policy = f"{EXAMPLE}:Fading"


@pytest.mark.parametrize("name", POLICIES)
def test_our_policies_conform(name: str) -> None:
    class Named(PolicyConformance):
        policy = name
        whens = ("step",)

    kit = Named()
    checks = [getattr(kit, check) for check in dir(kit) if check.startswith("test_")]
    for check in checks:
        if name != "full" or "budget_is_never" not in check.__name__:
            passed(check)


def passed(check: Any) -> None:
    """Run a check; one that does not apply is left out."""
    try:
        check()
    except pytest.skip.Exception:
        return


@dataclass(frozen=True, kw_only=True)
class Received(Policy):
    """Keep what received most attention."""

    name: ClassVar[str] = "received"

    def start(self, head: Head, cuts: Cuts) -> NDArray[np.float64]:
        return np.zeros(head.tokens)

    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        sums = block.received.cumsum(axis=0) + state[: block.stop]
        state[: block.stop] = sums[-1]
        return np.asarray(sums[cuts.rows - block.start])


class KeepsAll(Received):
    def decide(self, block: Block, cuts: Cuts, state: Any, cache: Cache) -> None:
        """Evict nothing."""


class Forgets(Received):
    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        """Sum within the block only."""
        return np.asarray(block.received.cumsum(axis=0)[cuts.rows - block.start])


class Unprotected(Received):
    def cuts(self, *args: Any) -> Cuts:
        made = super().cuts(*args)
        return Cuts(made.rows, made.limits, made.sinks * 0, made.recent * 0)


class Drawing(Received):
    def scores(self, block: Block, cuts: Cuts, state: Any) -> NDArray[np.float64]:
        return np.random.default_rng().random((len(cuts.rows), block.stop))


class Nameless(Received):
    name: ClassVar[str] = ""


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (KeepsAll, "test_the_budget_is_never_exceeded_after_a_decision"),
        (KeepsAll, "test_no_more_is_kept_than_the_oracle_says_is_possible"),
        (Forgets, "test_it_is_what_it_would_be_one_row_at_a_time"),
        (Unprotected, "test_protected_tokens_stay"),
        (Drawing, "test_equal_inputs_give_equal_bytes"),
        (Nameless, "test_it_says_what_it_is"),
    ],
)
def test_the_kit_fails_what_errs(kind: type[Policy], check: str) -> None:
    class Erring(PolicyConformance):
        policy = kind

    with pytest.raises(AssertionError):
        getattr(Erring(), check)()
    Erring.policy = Received
    getattr(Erring(), check)()
