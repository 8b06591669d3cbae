"""Sums over heads, layers and requests: what a result is made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.cache import left_window
from kvtrace_viewer.replay.kernels import NEVER, total_masses
from kvtrace_viewer.replay.measure import MASS_STEPS, HeadMeasures

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(eq=False)
class HeadTotals:
    """Totals [pair] over the measured rows and query heads of one KV head; they add up.

    `masses` counts the (query head, row) pairs that `mass` sums, `errors` those that `error`
    sums, `error_rows` the rows among them. `histogram` [pair, step] counts masses by the
    nearest multiple of 1 / MASS_STEPS; `worst` is infinite and `bound` NaN where there is none.
    """

    masses: Longs
    mass: Doubles
    worst: Doubles
    histogram: NDArray[np.int32]
    hits: Longs
    misses: Longs
    evictions: Longs
    sinks: int
    retained_sinks: Longs
    error: Doubles
    errors: Longs
    error_rows: Longs
    ties: Longs
    bound: Doubles

    @classmethod
    def zeros(cls, pairs: int) -> HeadTotals:
        """Nothing counted yet."""

        def longs() -> Longs:
            return np.zeros(pairs, dtype=np.int64)

        return cls(
            masses=longs(),
            mass=np.zeros(pairs),
            worst=np.full(pairs, np.inf),
            histogram=np.zeros((pairs, MASS_STEPS + 1), dtype=np.int32),
            hits=longs(),
            misses=longs(),
            evictions=longs(),
            sinks=0,
            retained_sinks=longs(),
            error=np.zeros(pairs),
            errors=longs(),
            error_rows=longs(),
            ties=longs(),
            bound=np.zeros(pairs),
        )

    def add(self, other: HeadTotals) -> None:
        """Add the totals of another head."""
        for name in self.__dataclass_fields__:
            if name != "worst":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = np.minimum(self.worst, other.worst)

    def mean_bound(self, pair: int) -> float | None:
        """`bound` as a mean like retained mass; None where there is none."""
        return as_mean(self.bound[pair], self.masses[pair])

    def p5(self, pair: int) -> float | None:
        """5th percentile of mass, to 5e-5; None where no row was measured."""
        counts = self.histogram[pair].cumsum()
        if not counts[-1]:
            return None
        return int(np.searchsorted(counts, 0.05 * counts[-1])) / MASS_STEPS


def as_mean(bound: float, masses: int) -> float | None:
    """A bound on a sum of masses as a mean like retained mass; None where there is none."""
    if not masses or not np.isfinite(bound):
        return None
    # What the dual says may lie above what there is.
    return min(float(bound / masses), 1.0)


@dataclass(eq=False)
class StepTotals:
    """Totals [pair, row] of one request over its layers and heads.

    `masses` counts the query heads that `mass` sums; rows that are not measured have 0.
    """

    masses: Longs
    mass: Doubles
    worst: Doubles
    hits: Longs
    misses: Longs
    evictions: Longs
    held: Longs

    @classmethod
    def zeros(cls, pairs: int, tokens: int) -> StepTotals:
        """Nothing counted yet."""

        def longs() -> Longs:
            return np.zeros((pairs, tokens), dtype=np.int64)

        return cls(
            masses=longs(),
            mass=np.zeros((pairs, tokens)),
            worst=np.full((pairs, tokens), np.inf),
            hits=longs(),
            misses=longs(),
            evictions=longs(),
            held=longs(),
        )


def summarise(
    measures: HeadMeasures,
    evicted_at: NDArray[np.int32],
    ties: Longs,
    bound: Doubles,
    steps: StepTotals,
) -> HeadTotals:
    """Total one head, and add its rows to `steps`."""
    head = measures.head
    pairs, tokens = evicted_at.shape
    sums, masses, worst = (
        np.zeros((pairs, tokens)),
        np.zeros(pairs, np.int64),
        np.full(pairs, np.inf),
    )
    histogram = np.zeros((pairs, MASS_STEPS + 1), dtype=np.int32)
    per_row = steps.masses, sums, steps.worst
    total_masses(measures.mass, MASS_STEPS, *per_row, masses, worst, histogram)
    steps.mass += sums
    steps.hits += measures.hits
    steps.misses += measures.misses
    by_model = left_window(head.tokens, head.window)
    evicted = (evicted_at != by_model) & (evicted_at != NEVER)
    for p in range(pairs):
        steps.evictions[p] += _per_row(evicted_at[p, evicted[p]], head.tokens)
        gone = _per_row(evicted_at[p, evicted_at[p] != NEVER], head.tokens)
        steps.held[p] += np.arange(1, head.tokens + 1) - gone.cumsum()
    sinks = measures.sinks()
    return HeadTotals(
        masses=masses,
        mass=sums.sum(axis=1),
        worst=worst,
        histogram=histogram,
        hits=measures.hits.sum(axis=1),
        misses=measures.misses.sum(axis=1),
        evictions=evicted.sum(axis=1),
        sinks=int(sinks.sum()),
        retained_sinks=np.einsum("gj,pj->p", sinks.astype(np.int64), evicted_at == NEVER),
        error=measures.error,
        errors=measures.error_rows * head.group,
        error_rows=measures.error_rows,
        ties=ties,
        bound=bound,
    )


def _per_row(rows: NDArray[np.int32], tokens: int) -> Longs:
    return np.bincount(rows, minlength=tokens)
