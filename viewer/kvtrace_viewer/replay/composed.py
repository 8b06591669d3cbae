"""Policies made from another one: its scores, used otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import Cuts
from kvtrace_viewer.replay.checks import check_scores
from kvtrace_viewer.replay.policies.snapkv import SnapKV
from kvtrace_viewer.replay.policy import NONE, Policy, parameter

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

TAKEN_OVER = ("across_heads", "takes_received", "default_when")
"""What holds for a composed policy because it holds for its base."""


@dataclass
class BaseState:
    """What the base of a composed policy keeps in one head.

    Attributes
    ----------
    own : Any
        The base's own state.
    rows : int64 [cut]
        Rows of the block's decisions.
    lines : float64 [cut, key]
        The base's scores at them; not there where the base's scores depend on what is held.
    """

    own: Any
    rows: Longs
    lines: Doubles


@dataclass(frozen=True, kw_only=True)
class Composed(Policy):
    """A policy that reads another one's scores.

    It needs the base's signals and its own, decides when the base does, and protects what the
    base protects unless its own `sinks` or `recent` say otherwise. Derived policies define
    `score_held` from `base_scores`.
    """

    base: Policy = parameter(  # noqa: RUF009 (a dataclass field; a policy never changes)
        SnapKV(), "the policy whose scores are used; it takes the keys not listed here", "policy"
    )

    def __post_init__(self) -> None:
        kind = type(self.base)
        whole = kind.shares_heads or kind.surveys or kind.selects or kind.looks_ahead
        if whole or not (_defines(kind, "scores") or _defines(kind, "score_held")):
            raise InputError(
                f"base of {self.name} is {self.base.name}, which does not score the tokens of one "
                "head; a policy that does was expected; write base=snapkv"
            )
        if isinstance(self.base, Composed):
            usual = type(self.base)().base.name
            if self.base.base.name != usual:
                raise InputError(
                    f"base of {self.name} is {self.base.name} over {self.base.base.name}; "
                    f"{usual} was expected under it; a second base cannot be chosen"
                )
        for name in TAKEN_OVER:
            object.__setattr__(self, name, getattr(self.base, name))
        object.__setattr__(self, "signals", type(self).signals | self.base.signals)
        super().__post_init__()
        if not self.sinks:
            object.__setattr__(self, "sinks", self.base.sinks)
        if self.recent == NONE:
            object.__setattr__(self, "recent", self.base.recent)

    @property
    def least_recent(self) -> int:
        """The base's."""
        return self.base.least_recent

    @property
    def prompt_queries(self) -> int | None:
        """The base's."""
        return self.base.prompt_queries

    def start(self, head: Head, cuts: Cuts) -> BaseState:
        """Return the base's state."""
        none = np.empty(0, np.int64)
        return BaseState(self.base.start(head, cuts), none, np.empty((0, 0)))

    def see(self, block: Block, cuts: Cuts, state: BaseState) -> None:
        """Let the base score the block, where it can before it is known what is held."""
        if self.base.needs_held:
            self.base.see(block, cuts, state.own)
            return
        lines = self.base.scores(block, cuts, state.own)
        state.rows = cuts.rows
        if len(cuts.rows):
            shape = (len(cuts.rows), block.stop)
            found = check_scores(self.base, "scores", lines, cuts.rows, shape)
            state.lines = found.astype(np.float64, copy=False)

    def base_scores(
        self, held: Longs, limit: int, row: int, block: Block, state: BaseState
    ) -> Doubles:
        """Return the base's scores of what is held; the highest where it protects.

        Returns
        -------
        float64 [held]
        """
        if self.base.needs_held:
            scores = self.base.score_held(held, limit, row, block, state.own)
        else:
            scores = state.lines[int(np.searchsorted(state.rows, row)), held]
        recent = max(int(self.recent.of(np.array([limit]))[0]), self.base.least_recent)
        protected = (held < self.sinks) | (held > row - recent)
        return np.where(protected, scores.max(), scores)

    @property
    def bound_scope(self) -> str | None:
        """The base's, where that moves budgets between layers; else by what is shared here."""
        of_base = self.base.bound_scope
        return "layer" if self.shares_heads and of_base == "head" else of_base

    def limits(self, budget: Budget, rows: Longs, head: Head) -> Longs:
        """The base's."""
        return self.base.limits(budget, rows, head)

    def parameters(self) -> dict[str, Any]:
        """Every parameter, the base's too, as plain values."""
        own = super().parameters() | {"base": self.base.name}
        return own | {k: v for k, v in self.base.parameters().items() if k not in own}

    def defaults(self) -> dict[str, Any]:
        """Parameters of the same policy over the same kind of base, none of them given."""
        found = type(self)(base=type(self.base)()).parameters()
        return found | {"base": type(self)().base.name}


def _defines(kind: type[Policy], method: str) -> bool:
    return getattr(kind, method) is not getattr(Policy, method)
