"""The one pass: attention rows are computed once and feed every policy at every budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kvtrace_viewer.replay.amounts import Budget
from kvtrace_viewer.replay.block import BLOCK_ROWS, Block, Head
from kvtrace_viewer.replay.cache import Cache
from kvtrace_viewer.replay.measure import HeadMeasures, Measures
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.replay.selector import Selector
from kvtrace_viewer.replay.totals import HeadTotals, StepTotals, summarise
from kvtrace_viewer.replay.when import When

Longs = NDArray[np.int64]

Progress = Callable[[int], None]
"""Told how many rows of one layer have been passed since it was last told."""


@dataclass(frozen=True)
class Run:
    """One policy, deciding at one rhythm, at several budgets: neighbouring pairs."""

    policy: Policy
    when: When
    budgets: list[Budget]


class _RunState:
    """One run in one head."""

    def __init__(self, run: Run, head: Head, columns: slice, evicted_at: NDArray[np.int32]) -> None:
        self.policy = run.policy
        self.budgets = run.budgets
        self.columns = columns
        self.cuts = run.policy.cuts(run.when, run.budgets, head)
        self.cache = Cache(self.cuts, head.window, evicted_at[columns])
        self.state: Any = run.policy.start(head, self.cuts)
        self.first_row = int(self.cuts.rows[0]) + 1 if len(self.cuts.rows) else head.tokens
        self.read_rows: list[Longs] = []
        self.read_bits: list[NDArray[np.uint8]] = []

    def keep_reads(self, rows: Longs, read: NDArray[np.bool_]) -> None:
        """Keep what queries read, as `reads.Reads` has it: bits [budget, row, byte]."""
        bits = np.zeros((*read.shape[:2], -(-self.cache.evicted_at.shape[1] // 8)), np.uint8)
        packed = np.packbits(read, axis=2)
        bits[:, :, : packed.shape[2]] = packed
        self.read_rows.append(rows)
        self.read_bits.append(bits)

    def select(self, block: Block) -> tuple[Longs, NDArray[np.bool_]]:
        """Rows of a block that are measured, and what they read: bool [budget, row, key]."""
        rows = np.arange(max(block.start, self.first_row), block.stop)
        rows = rows[block.head.has_query[rows]]
        if not len(rows) or not isinstance(self.policy, Selector):
            return rows, np.zeros((len(self.budgets), len(rows), block.stop), np.bool_)
        reads = [self.policy.reads(budget, rows, block.head) for budget in self.budgets]
        limits = np.stack(reads, axis=1)
        chosen = self.policy.select(block, rows, limits, self.cache, self.state)
        keys = np.arange(block.stop)
        held = self.cache.evicted_at[:, None, : block.stop] >= rows[:, None]
        return rows, np.where(keys == rows[:, None], True, chosen & held & (keys < rows[:, None]))

    def foreseen(self) -> Any:
        """What `bounds.bound_together` takes of this head; None where nothing bounds it."""
        return self.policy.foreseen(self.state) if len(self.cuts.rows) else None

    def bound(self) -> NDArray[np.float64]:
        found = self.policy.bound(self.state) if len(self.cuts.rows) else None
        return np.full(len(self.cache.counts), np.nan) if found is None else found


class HeadReplay:
    """All runs in one KV head of one request.

    Attributes
    ----------
    evicted_at : int32 [pair, token]
        Row after which a token was evicted or left the model's own window.
    """

    def __init__(self, head: Head, runs: list[Run], options: Measures) -> None:
        self.head = head
        self.options = options
        pairs = sum(len(run.budgets) for run in runs)
        self.evicted_at = np.empty((pairs, head.tokens), dtype=np.int32)
        self.runs: list[_RunState] = []
        first_rows: list[int] = []
        for run in runs:
            columns = slice(len(first_rows), len(first_rows) + len(run.budgets))
            self.runs.append(_RunState(run, head, columns, self.evicted_at))
            first_rows += [self.runs[-1].first_row] * len(run.budgets)
        selects = np.repeat([run.policy.selects for run in runs], [len(r.budgets) for r in runs])
        first = np.array(first_rows, dtype=np.int64)
        self.measures = HeadMeasures(head, first, options, selects)
        self.buffer = np.empty(head.group * BLOCK_ROWS * head.tokens, dtype=np.float32)

    def block(self, start: int, stop: int) -> Block:
        """Compute the attention rows start..stop-1."""
        rows = self.head.rows(start, stop, self.buffer)
        return Block(self.head, start, stop, rows, self.options.needed_share)

    def look_ahead(self) -> None:
        """Show the rows, last block first, to the policies that know the future."""
        seers = [r for r in self.runs if r.policy.looks_ahead and len(r.cuts.rows)]
        if not seers:
            return
        first = min(r.first_row for r in seers)
        for start, stop in reversed(list(blocks(self.head))):
            if stop < first:
                return
            block = self.block(start, stop)
            for run in seers:
                if stop >= run.first_row:
                    run.policy.look_ahead(block, run.cuts.within(start, stop), run.state)

    def decide(self, block: Block) -> None:
        """Make the decisions of one block that this head makes alone."""
        for run in self.runs:
            if not run.policy.shares_heads:
                cuts = run.cuts.within(block.start, block.stop)
                run.policy.decide(block, cuts, run.state, run.cache)

    def measure(self, block: Block) -> None:
        """Measure one block whose decisions have been made."""
        self.measures.add(block, self.evicted_at)
        for run in self.runs:
            if run.policy.selects:
                rows, read = run.select(block)
                self.measures.add_read(block, run.columns, rows, read)
                if self.options.keep_reads:
                    run.keep_reads(rows, read)

    def advance(self, block: Block) -> None:
        """Decide, then measure, one block."""
        self.decide(block)
        self.measure(block)

    def summarise(self, steps: StepTotals) -> HeadTotals:
        """Total what was measured, and add the rows to `steps`."""
        ties = np.concatenate([run.cache.ties for run in self.runs])
        bound = np.concatenate([run.bound() for run in self.runs])
        return summarise(self.measures, self.evicted_at, ties, bound, steps)


def blocks(head: Head) -> Iterator[tuple[int, int]]:
    """Row ranges of at most 64, none across the end of the prompt."""
    for first, last in ((0, head.prompt_tokens), (head.prompt_tokens, head.tokens)):
        for start in range(first, last, BLOCK_ROWS):
            yield start, min(start + BLOCK_ROWS, last)


@contextmanager
def workers(threads: int | None = None) -> Iterator[Executor]:
    """Give a pool with a thread per core, or as many as asked for.

    Heads are the threads: BLAS's own on top of them cost ten times the work.
    """
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(threads or os.cpu_count()) as pool,
    ):
        yield pool


def _decide_together(states: list[_RunState], seen: list[Block]) -> None:
    """Make one run's decisions of a block in all heads of a layer."""
    cuts = [one.cuts.within(seen[0].start, seen[0].stop) for one in states]
    caches = [one.cache for one in states]
    states[0].policy.decide_layer(seen, cuts, [one.state for one in states], caches)


def replay_layer(
    heads: list[Head],
    runs: list[Run],
    options: Measures,
    pool: Executor,
    progress: Progress,
) -> list[HeadReplay]:
    """Replay all runs in the KV heads of one layer of one request."""
    replays = list(pool.map(lambda head: HeadReplay(head, runs, options), heads))
    list(pool.map(HeadReplay.look_ahead, replays))
    shared = [r for r, run in enumerate(runs) if run.policy.shares_heads]
    together = shared or any(run.policy.across_heads for run in runs)
    for start, stop in blocks(heads[0]):
        if together:
            rows = list(pool.map(lambda r: r.block(start, stop), replays))  # noqa: B023
            seen = [replace(block, layer=tuple(rows)) for block in rows]
            list(pool.map(HeadReplay.decide, replays, seen))
            for r in shared:
                _decide_together([one.runs[r] for one in replays], seen)
            list(pool.map(HeadReplay.measure, replays, seen))
        else:
            list(pool.map(lambda r: r.advance(r.block(start, stop)), replays))  # noqa: B023
        progress(stop - start)
    return replays
