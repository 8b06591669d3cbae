"""What a user should know of a result beside its numbers."""

from __future__ import annotations

import numpy as np

from kvtrace_viewer.replay.collected import Collected
from kvtrace_viewer.replay.pairs import Pair
from kvtrace_viewer.replay.replayable import left_out
from kvtrace_viewer.replay.rerotation import RENUMBERED


def notes(gathered: Collected, pair: Pair) -> tuple[str, ...]:
    """Say what was left out, what protection does not fit, and what a rhythm loses."""
    found = left_out(gathered.trace, list(gathered.held))
    found += map(str, gathered.left_out)
    if gathered.ropes is not None:
        found.append(RENUMBERED)
    if gathered.moving.beyond[gathered.pairs.index(pair)]:
        found.append(
            f"{pair.spec} at {pair.budget} has no bound: its shares of the budget, together, are"
            " more than equal ones, by rounding or as windows cut some of them; the oracle's"
            " bounds are over equal ones"
        )
    present = max(len(rows) for _, rows in gathered.replayed.values())
    limit = pair.budget.limits(np.array([present]))
    last = max(int(pair.policy.recent.of(limit)[0]), pair.policy.least_recent)
    protected = pair.policy.sinks + last
    if protected > limit[0]:
        found.append(
            f"{pair.spec} at {pair.budget}: {protected} protected tokens do not fit; the first "
            "were protected before the last, up to the budget"
        )
    elif _loses_sinks(gathered, pair):
        found.append(
            f"{pair.spec}, --when {pair.when}: a percentage of its first tokens is fewer than"
            f" its {pair.policy.sinks} sinks, so that some go at once and for good; a budget"
            " in tokens, or --when step, keeps them"
        )
    return tuple(found)


def _loses_sinks(gathered: Collected, pair: Pair) -> bool:
    """Whether a cut comes while the budget is smaller than the protection of first tokens."""
    for request, _ in gathered.replayed.values():
        present = gathered.rhythm(pair, request).cuts(request.tokens, request.prompt_tokens) + 1
        protected = np.minimum(present, pair.policy.sinks)
        if bool((pair.budget.limits(present) < protected).any()):
            return True
    return False
