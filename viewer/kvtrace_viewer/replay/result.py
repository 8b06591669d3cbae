"""What a replay says about one policy at one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.places import RowPlaces
from kvtrace_viewer.replay.gaps import LeftOut
from kvtrace_viewer.replay.reads import Reads

Columns = Mapping[str, Any]
"""Equally long columns of a table of schema.sql."""


BOUNDS = {"head": "bound", "layer": "bound_layer", "model": "bound_model"}
"""The oracle's bounds by what they are over: see `Policy.bound_scope`."""
SCOPES = (*BOUNDS, "read")
"""Every `Policy.bound_scope`; what queries may read is bounded by what `top_k` retains."""


@dataclass(frozen=True, eq=False)
class ReplayedRequest:
    """A request as it was replayed.

    Attributes
    ----------
    rows : int64 [token]
        The index of each position on axis 0 of `evicted_at`.
    last_cut : int
        Row of the last decision; the last row where there was none.
    """

    rows: NDArray[np.int64]
    last_cut: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """One policy at one budget over the replayed requests.

    Attributes
    ----------
    id : str
        Name of its folder under the trace's `replays/`.
    policy, budget, when : str
        As the user wrote them (`when` filled in where left open).
    parameters : dict
        Every parameter of the policy, defaults too.
    exactness : str
        E0, E1 or E2 (docs/policies.md).
    tokens, measured_rows : int
        Tokens in the replayed requests; rows after the first cut, which are what is measured.
    hits, misses : int
        Needed (query, key) pairs, kept and evicted, over all query heads and layers.
    evictions : int
        (token, layer, KV head) slots the policy evicted; what the model's own sliding window
        drops is not counted.
    sinks, retained_sinks : int
        (query head, key) sinks of the full cache, and those still held at the end.
    retained_mass, mass_p5, mass_worst : float or None
        Share of attention on kept keys: mean, 5th percentile (to 5e-5) and least over query
        heads, layers and measured rows; None where no row follows the first cut.
    rerotate : bool
        Whether kept tokens were renumbered by their place in the cache and their keys re-rotated:
        `overlap` and `output_error` are then of what is attended to so, all else as without.
    overlap : float or None
        Mean over `output_rows` rows and query heads of what attention has in common with the full
        cache's, sum_j min(a[i,j], a'[i,j]); None without re-rotation, where it is retained mass.
    output_error : float or None
        Mean relative error of the attention output over `output_rows` rows; None without v.
    ties : int
        Cuts, over layers and KV heads, whose margin was 0.
    bound, bound_layer, bound_model : float or None
        Most mass that any policy can retain under this budget: where every KV head has it, where
        the heads of a layer share theirs, where all heads of all layers do; the oracle's only.
    bound_scope : str or None
        Which bound holds for this policy (`Policy.bound_scope`); None where none does, also
        because it takes more than its budget in sum.
    left_out : tuple of LeftOut
        Rows that the trace's gaps kept from being replayed or measured.
    notes : tuple of str
        What a reader should know, such as a budget below the policy's protection.
    places : RowPlaces
        Where the trace's rows stand on axis 0 of `evicted_at`.
    evicted_at : int32 [row, layer, kv_head]
        Position of the query after whose row a slot was evicted (or left the model's own
        sliding window); -1: never. -1 too for rows, layers and heads that were not replayed.
    reads : dict of int to dict of int to Reads
        By request and layer, what queries read that choose it; empty unless asked for.
    selects : bool
        Whether queries choose what they read: `evicted_at` is then of what is stored.
    steps, heads : columns of tables replay_steps and replay_heads
    """

    id: str
    policy: str
    parameters: dict[str, Any]
    budget: str
    when: str
    exactness: str
    tokens: int
    measured_rows: int
    hits: int
    misses: int
    evictions: int
    sinks: int
    retained_sinks: int
    retained_mass: float | None
    mass_p5: float | None
    mass_worst: float | None
    rerotate: bool
    overlap: float | None
    output_error: float | None
    output_rows: int
    ties: int
    bound: float | None
    bound_layer: float | None
    bound_model: float | None
    bound_scope: str | None
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    places: RowPlaces = field(repr=False)
    evicted_at: NDArray[np.int32] = field(repr=False)
    reads: dict[int, dict[int, Reads]] = field(repr=False)
    selects: bool
    steps: Columns = field(repr=False)
    heads: Columns = field(repr=False)
    requests: dict[int, ReplayedRequest] = field(repr=False)
    kv_heads: dict[int, list[int]] = field(repr=False)
    """The model's numbers of the replayed KV heads, by layer."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, as `kvtrace replay --json` prints them."""
        names = (
            "policy",
            "budget",
            "when",
            "exactness",
            "tokens",
            "measured_rows",
            "hits",
            "misses",
            "evictions",
            "sinks",
            "retained_sinks",
            "retained_mass",
            "mass_p5",
            "mass_worst",
            "rerotate",
            "overlap",
            "output_error",
            "output_rows",
            "ties",
            "bound_scope",
            "selects",
        )
        found = {"id": self.id, **{name: getattr(self, name) for name in names}}
        if self.bound is not None or self.policy.partition(":")[0] == "oracle":
            found |= {name: getattr(self, name) for name in BOUNDS.values()}
        return found | {
            "left_out": [rows.to_json() for rows in self.left_out],
            "notes": list(self.notes),
        }

    def bound_of(self, scope: str | None) -> float | None:
        """The bound that this result, the oracle's or `top_k`'s, gives to a `bound_scope`."""
        if scope == "read":
            return self.retained_mass if self.policy == "top_k" else None
        found: float | None = None if scope is None else getattr(self, BOUNDS[scope])
        return found

    def kept(self, request: int | None = None) -> dict[int, dict[int, NDArray[np.int64]]]:
        """Positions held after the last decision, by layer and KV head, ascending.

        Parameters
        ----------
        request : int, optional
            Which request; may be left out where only one was replayed.

        Raises
        ------
        InputError
            For a request that was not replayed, or none given where there are several.
        """
        have = ", ".join(map(str, self.requests))
        if request is None and len(self.requests) > 1:
            raise InputError(
                f"kept sets are of one request; requests {have} were replayed; "
                "choose one with --request N"
            )
        number = next(iter(self.requests)) if request is None else request
        if number not in self.requests:
            raise InputError(f"request {number} was not replayed; {have} were; choose one of them")
        found = self.requests[number]
        gone = self.evicted_at[found.rows[: found.last_cut + 1]]
        held = (gone < 0) | (gone > found.last_cut)
        return {
            layer: {head: np.flatnonzero(held[:, layer, head]) for head in heads}
            for layer, heads in self.kv_heads.items()
        }
