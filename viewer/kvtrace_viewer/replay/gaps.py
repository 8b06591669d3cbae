"""Rows that a replay leaves out, because the trace has a gap there: which, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.holdings import Holdings
from kvtrace.model import LayerData, Request, number_text
from kvtrace.trace import Trace
from kvtrace_viewer.replay.block import Head

BEHIND_A_GAP = "keys or values of a layer are missing at the first of them, so it ends before"
NO_QUERY = "their queries were not kept: they are not measured, and sinks are told by the others"
NO_LSE = "their log-sum-exp is missing: they are not measured"

NEVER_RECORDED = ("tokens", "sequences", "model calls", "exact attention of rows")
"""What of table `gaps` a replay cannot know about: rows that are not there."""

SHOWN = 60
"""Characters of positions that a note shows."""


@dataclass(frozen=True)
class LeftOut:
    """Rows of one request that are not replayed, or replayed and not measured.

    Attributes
    ----------
    request : int or None
        None where the trace does not say whose rows were lost.
    positions : int64 [row], ascending; empty where it does not say which
    count : int
    reason : str
    """

    request: int | None
    positions: NDArray[np.int64]
    count: int
    reason: str

    @classmethod
    def of(cls, request: int, positions: NDArray[np.int64], reason: str) -> LeftOut:
        """Rows of a request."""
        return cls(request, positions, len(positions), reason)

    def to_json(self) -> dict[str, Any]:
        """As `kvtrace replay --json` prints it: rows as "0,4-7", null where not known."""
        rows = number_text(self.positions.tolist()) if len(self.positions) else None
        return {
            "request": self.request,
            "rows": rows,
            "count": self.count,
            "reason": self.reason,
        }

    def ranges(self) -> list[tuple[int, int]]:
        """First and last positions of its stretches."""
        breaks = np.flatnonzero(np.diff(self.positions) > 1)
        firsts = self.positions[np.append(0, breaks + 1)] if len(self.positions) else ()
        lasts = self.positions[np.append(breaks, -1)] if len(self.positions) else ()
        return [(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]

    def __str__(self) -> str:
        if not len(self.positions):
            return f"{self.count:,} rows are not in the trace: {self.reason}"
        rows = number_text(self.positions.tolist())
        if len(rows) > SHOWN:
            rows = f"{rows[:SHOWN].rpartition(',')[0]},... ({self.count:,} rows)"
        return f"request {self.request}, rows {rows} are left out: {self.reason}"


def lost_rows(trace: Trace) -> list[LeftOut]:
    """Rows that were never recorded, by the reasons in table `gaps`."""
    counts: dict[str, int] = {}
    for row in trace.table("gaps").to_pylist():
        if row["what"] in NEVER_RECORDED:
            reason = f"{row['what']}: {row['reason']}"
            counts[reason] = counts.get(reason, 0) + row["count"]
    nowhere = np.empty(0, np.int64)
    return [LeftOut(None, nowhere, count, reason) for reason, count in counts.items()]


def whole_tokens(trace: Trace, request: Request, layers: Sequence[int]) -> int:
    """Tokens of a request before the first one that some of `layers` has no keys or values of.

    Attention behind such a token cannot be told, so that a replay ends before it.
    """
    if "layer rows" not in trace.table("gaps")["what"].to_pylist():
        return request.tokens
    tokens = request.tokens
    for layer in layers:
        data = trace.layer_data(layer, request.request)
        for values in (data.k, data.v):
            if values is not None:
                missing = np.flatnonzero(~np.isfinite(values[:tokens]).all(axis=(1, 2)))
                tokens = int(missing[0]) if len(missing) else tokens
    return tokens


def first_rows(data: LayerData, tokens: int) -> LayerData:
    """The first `tokens` of a layer's data."""
    arrays = {name: getattr(data, name) for name in ("q", "k", "v", "lse", "received")}
    cut: dict[str, Any] = {name: None if x is None else x[:tokens] for name, x in arrays.items()}
    return replace(data, **cut)


def first_holdings(held: Holdings, tokens: int) -> Holdings:
    """The same of what the trace holds."""
    prompt = min(held.prompt_tokens, tokens)
    return replace(held, queries=held.queries[:tokens], prompt_tokens=prompt)


def without_query(heads: Sequence[Head]) -> NDArray[np.bool_]:
    """[token]: rows that are not measured in some head of a layer."""
    return np.asarray(~np.logical_and.reduce([head.has_query for head in heads]))


def left_out_rows(
    request: Request, tokens: int, unmeasured: NDArray[np.bool_], held: Holdings
) -> list[LeftOut]:
    """What a replay of the first `tokens` of a request left out of it."""
    behind = np.arange(tokens, request.tokens)
    no_query = np.flatnonzero(~held.queries)
    no_lse = np.flatnonzero(unmeasured & held.queries)
    found = [(behind, BEHIND_A_GAP), (no_query, NO_QUERY), (no_lse, NO_LSE)]
    return [LeftOut.of(request.request, rows, why) for rows, why in found if len(rows)]
