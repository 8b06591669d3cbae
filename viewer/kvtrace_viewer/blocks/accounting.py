"""What counts as an access and as a hit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.policy import HIT, MISS, REFUSED, UNREAD, Hits
from kvtrace_viewer.blocks.stream import BlockStream, Counts
from kvtrace_viewer.replay.jit import jit

#: By mode: what each value means, for help texts.
MODES: dict[str, dict[str, str]] = {
    "hits": {
        "block": "every block that is there",
        "prefix": "those before a request's first miss, as a prefix cache can use them",
    },
    "blocks": {
        "all": "every block",
        "full": "only full blocks; others are not asked for and take no place",
    },
    "unit": {"block": "blocks", "token": "the tokens in them"},
}


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """How hits are counted; part of every result."""

    hits: str = "block"
    blocks: str = "all"
    unit: str = "block"

    def __post_init__(self) -> None:
        for mode, values in MODES.items():
            found = getattr(self, mode)
            if found not in values:
                raise InputError(
                    f"accounting {mode}={found} is unknown; one of {', '.join(values)} was"
                    " expected; kvtrace blocks --help explains them"
                )

    def count(self, stream: BlockStream, found: Hits) -> tuple[int, int]:
        """Accesses and hits, in the unit, of what became of each access."""
        if self.hits == "prefix":
            found = before_first_miss(found, stream.starts)
        weights = stream.tokens if self.unit == "token" else None
        sums = np.bincount(found, weights, minlength=4)
        return round(sums.sum() - sums[UNREAD]), round(sums[HIT])

    def to_json(self) -> dict[str, str]:
        """The modes, by name."""
        return {mode: getattr(self, mode) for mode in MODES}


def before_first_miss(found: Hits, starts: Counts) -> Hits:
    """The same with every hit behind a request's first miss made a miss."""
    kept = found.copy()
    _cut(kept, starts)
    return kept


@jit
def _cut(found: Hits, starts: Counts) -> None:
    for r in range(len(starts) - 1):
        missed = False
        for i in range(starts[r], starts[r + 1]):
            missed |= found[i] == MISS or found[i] == REFUSED
            if missed and found[i] == HIT:
                found[i] = MISS
