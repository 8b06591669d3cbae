"""The pairs of policy and budget that a replay was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvtrace.errors import InputError
from kvtrace_viewer.replay.amounts import Budget, parse_budget, parse_budgets
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.spec import parse_policy
from kvtrace_viewer.replay.when import When, parse_when


@dataclass(frozen=True)
class Pair:
    """One policy at one budget: a column of everything."""

    spec: str
    policy: Policy
    budget: Budget
    when: When

    @property
    def id(self) -> str:
        """Name of the result: `h2o-25pct-step`."""
        text = f"{self.spec}-{self.budget}-{self.when}".replace("%", "pct")
        return re.sub(r"[^A-Za-z0-9_.=-]", ".", text)


def pairs_of(
    policies: Sequence[str | Policy],
    budgets: Sequence[str | int | Budget],
    when: str | When | None,
) -> list[Pair]:
    """Every policy at every budget; one that was given twice counts once.

    Raises
    ------
    InputError
        For none at all, and for an unknown policy, parameter, budget or rhythm.
    """
    limits = list(dict.fromkeys(one for budget in budgets for one in _budgets(budget)))
    found: dict[str, Pair] = {}
    for text in policies:
        policy = parse_policy(text)
        spec = policy.spec if isinstance(text, Policy) else text
        rhythm = parse_when(when or policy.default_when)
        for budget in limits:
            pair = Pair(spec, policy, budget, rhythm)
            found.setdefault(pair.id, pair)
    if not found:
        raise InputError(
            f"{len(policies)} policies and {len(budgets)} budgets were given; at least one of "
            "each was expected; name a policy and a budget"
        )
    return list(found.values())


def _budgets(given: str | int | Budget) -> list[Budget]:
    return parse_budgets(given) if isinstance(given, str) else [parse_budget(given)]
