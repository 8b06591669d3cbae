"""Tier runs in the form that the page shows them: series over time, and maps of who lay where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.cached import cached_requests
from kvtrace.errors import InputError
from kvtrace.trace import Trace
from kvtrace_viewer.derived.results import evicted_at
from kvtrace_viewer.tiers.recorded import recorded_steps

#: Rows of a map and columns of everything over time: more cannot be told apart.
MAX_ROWS = 160
MAX_COLUMNS = 240

Longs = NDArray[np.int64]


def tier_runs(trace: Trace) -> list[dict[str, Any]]:
    """Rows of table `tier_runs`, the newest first."""
    rows = trace.table("tier_runs").to_pylist()
    return sorted(rows, key=lambda row: -row["created_ns"])


def tier_run(trace: Trace, run: str) -> dict[str, Any]:
    """One of them.

    Raises
    ------
    InputError
        For a name that is not listed; names are never joined to a path unlisted.
    """
    for row in tier_runs(trace):
        if row["tier_run"] == run:
            return row
    raise InputError(f"no tier run {run!r} in {trace.name}; expected one of those listed")


def rows_of(trace: Trace, table: str, run: str) -> dict[str, NDArray[Any]]:
    """A run's rows of a tier table, as columns."""
    for part in trace.table_parts(table):
        if part.num_rows and part["tier_run"][0].as_py() == run:
            return {
                name: part[name].to_numpy(zero_copy_only=False)
                for name in part.column_names
                if name != "tier_run"
            }
    return {}


def levels(trace: Trace, run: str) -> list[dict[str, Any]]:
    """Rows of table `tier_levels` of a run."""
    found = rows_of(trace, "tier_levels", run)
    return [
        {name: _plain(values[i]) for name, values in found.items()}
        for i in range(len(found.get("tier", ())))
    ]


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass(frozen=True, eq=False)
class Series:
    """A run over time, in at most `MAX_COLUMNS` stretches of steps.

    Attributes
    ----------
    seconds : float64 [stretch]
        Where each ends, from the first step's begin.
    held : float64 [tier, stretch]
        Bytes in each tier at its end.
    up, down : float64 [tier, stretch]
        Bytes that crossed the link above each tier.
    compute, stall : float64 [stretch]
        Seconds.
    """

    seconds: NDArray[np.float64]
    held: NDArray[np.float64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]
    compute: NDArray[np.float64]
    stall: NDArray[np.float64]


def series(trace: Trace, run: str) -> Series:
    """Read what a run held, moved and waited for over time."""
    steps = rows_of(trace, "tier_steps", run)
    held = rows_of(trace, "tier_occupancy", run)
    moved = rows_of(trace, "tier_transfers", run)
    tiers = len(levels(trace, run))
    if not held:
        nothing = np.zeros((tiers, 0))
        return Series(nothing[0], nothing, nothing, nothing, nothing[0], nothing[0])
    last = int(held["step"].max())
    stretches = min(MAX_COLUMNS, last + 1)
    width = -(-(last + 1) // stretches)
    stretches = -(-(last + 1) // width)

    def summed(step: Longs, values: Any) -> NDArray[np.float64]:
        return np.bincount(step // width, values, minlength=stretches).astype(np.float64)

    ends = np.minimum(width * np.arange(1, stretches + 1) - 1, last)
    shape = (last + 1, tiers)
    at_end = held["bytes"].reshape(shape)[ends].T.astype(np.float64)
    times = held["ts_ns"].reshape(shape)[ends, 0]
    links = {
        way: np.stack(
            [
                summed(moved["step"][some], moved["bytes"][some])
                for some in (
                    (moved["tier"] == tier) & (moved["direction"] == way) for tier in range(tiers)
                )
            ]
        )
        if moved
        else np.zeros((tiers, stretches))
        for way in ("up", "down")
    }
    began = int(steps["started_ns"].min()) if steps else int(times[0])
    at = steps["step"]
    if (at > last).any():
        # Decode steps of whole blocks are numbered behind the prompts: theirs is the time.
        by_time = np.searchsorted(times, steps["started_ns"])
        at = np.where(at > last, width * np.minimum(by_time, stretches - 1), at)
    return Series(
        seconds=(times - began) / 1e9,
        held=at_end,
        up=links["up"],
        down=links["down"],
        compute=summed(at, steps["compute_ns"] / 1e9),
        stall=summed(at, steps["stall_ns"] / 1e9),
    )


@dataclass(frozen=True, eq=False)
class Residency:
    """Who lay where over time: rows are blocks (or tokens), several to a row where there are many.

    Attributes
    ----------
    first, size, count : int
        The first block, blocks to a row, and blocks of the whole run.
    steps : int64 [column]
        The last step of each column.
    counts : int32 [row, column, tier]
        Blocks of the row that the tier held after that step (slots, of tokens).
    index, tokens, accesses : int64 [row]
        Of the row's first block: index in its sequence, tokens in it; accesses of all of them
        (fetches, of tokens).
    """

    first: int
    size: int
    count: int
    steps: Longs
    counts: NDArray[np.int32]
    index: Longs
    tokens: Longs
    accesses: Longs


def residency(
    trace: Trace, run: str, first: int = 0, count: int | None = None, request: int | None = None
) -> Residency:
    """Map the blocks first..first+count-1 of a run, or the tokens of one of its requests."""
    kind = tier_run(trace, run)
    if kind["kind"] == "tokens":
        request = cached_requests(trace)[0] if request is None else request
        return _tokens(trace, kind["tier_run"], kind["replay"], request, first, count)
    blocks = rows_of(trace, "tier_blocks", run)
    moves = rows_of(trace, "tier_moves", run)
    steps = rows_of(trace, "tier_steps", run)
    if not moves:
        return _nothing()
    # Blocks move with prompts; decode steps are numbered behind them.
    last = int(steps["step"][steps["phase"] == "prefill"].max())
    window = _Window.of(first, count, len(blocks["block"]), last + 1)
    some = (moves["block"] >= window.first) & (moves["block"] < window.stop)
    change = np.where(moves["arrives"][some], 1, -1)
    tiers = len(levels(trace, run))
    counts = window.counts(
        moves["block"][some], moves["step"][some], moves["tier"][some], change, tiers
    )
    return window.residency(counts, blocks["block_index"], blocks["tokens"], blocks["accesses"])


def _tokens(
    trace: Trace, run: str, replay: str, request: int, first: int, count: int | None
) -> Residency:
    """Slots of a request's tokens: hot from their row on, cold from the row that evicted them."""
    table = rows_of(trace, "tier_tokens", run)
    mine = table["request"] == request
    if not mine.any():
        raise InputError(f"no request {request} in tier run {run}; expected one that was replayed")
    steps = recorded_steps(trace)
    tokens = int(mine.sum())
    at = steps.of_rows(trace.request_rows(request)[:tokens])
    begin = int(at[0])
    window = _Window.of(first, count, tokens, int(at[-1]) - begin + 1)
    counts = np.zeros((window.rows, len(window.steps), 2), np.int32)
    positions = np.arange(window.first, window.stop)
    arrived = at[positions] - begin
    hot, cold = np.zeros_like(positions), np.ones_like(positions)
    one = np.ones_like(positions)
    for spec in trace.layers_of(request):
        for kv_head in spec.kv_head_numbers:
            gone = evicted_at(trace, replay, spec.layer, kv_head, request)[
                window.first : window.stop
            ]
            left = gone >= 0
            went = at[np.where(left, gone, 0)] - begin
            for block, step, tier, change in (
                (positions, arrived, hot, one),
                (positions[left], went[left], hot[left], -one[left]),
                (positions[left], went[left], cold[left], one[left]),
            ):
                counts += window.counts(block, step, tier, change, 2)
    return window.residency(counts, np.arange(tokens), np.ones(tokens), table["fetches"][mine])


def _nothing() -> Residency:
    none = np.empty(0, np.int64)
    return Residency(0, 1, 0, none, np.empty((0, 0, 0), np.int32), none, none, none)


@dataclass(frozen=True)
class _Window:
    """Which blocks are shown, and how many blocks and steps share a row and a column."""

    first: int
    stop: int
    size: int
    total: int
    width: int
    steps: Longs

    @classmethod
    def of(cls, first: int, count: int | None, total: int, steps: int) -> _Window:
        first = min(max(first, 0), max(total - 1, 0))
        stop = total if count is None else min(total, first + max(count, 1))
        size = max(1, -(-(stop - first) // MAX_ROWS))
        width = max(1, -(-steps // MAX_COLUMNS))
        ends = np.minimum(np.arange(width - 1, steps + width - 1, width), steps - 1)
        return cls(first, stop, size, total, width, ends.astype(np.int64))

    @property
    def rows(self) -> int:
        return -(-(self.stop - self.first) // self.size)

    def counts(
        self, block: Longs, step: Longs, tier: Longs, change: Longs, tiers: int
    ) -> NDArray[np.int32]:
        """What changes at these steps come to: int32 [row, column, tier]."""
        shape = (self.rows, len(self.steps), tiers)
        where = ((block - self.first) // self.size, step // self.width, tier)
        flat = np.ravel_multi_index(where, shape)
        found = np.bincount(flat, change, minlength=int(np.prod(shape))).reshape(shape)
        return found.cumsum(axis=1).astype(np.int32)

    def residency(
        self, counts: NDArray[np.int32], index: Any, tokens: Any, accesses: Any
    ) -> Residency:
        begins = np.arange(self.first, self.stop, self.size)
        return Residency(
            first=self.first,
            size=self.size,
            count=self.total,
            steps=self.steps,
            counts=counts,
            index=np.asarray(index)[begins].astype(np.int64),
            tokens=np.asarray(tokens)[begins].astype(np.int64),
            accesses=np.add.reduceat(
                np.asarray(accesses)[self.first : self.stop], begins - self.first
            ),
        )
