"""What is measured, for all pairs of policy and budget at once, in one KV head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import left_window
from kvtrace_viewer.replay.kernels import (
    NEVER,
    add_back,
    add_far,
    count_hits,
    held_at_end,
    keep_held,
)

MASS_STEPS = 10_000
"""Percentiles of mass are read from a histogram over multiples of 1/10,000: good to 5e-5."""

PANEL = 16
"""Pairs in one matrix product. Always the same, because BLAS rounds differently by shape, and a
policy's numbers must not depend on which others are replayed with it."""

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True)
class Measures:
    """The settable thresholds of what is measured.

    Attributes
    ----------
    needed_share : float
        A query needs a key that gets at least this many uniform shares 1/(i+1).
    sink_share : float
        A key is a sink in a query head when its mean attention over the queries more than
        `sink_distance` positions later (that can see it) is at least this.
    sink_distance : int
        In positions; a quarter of the request where that is less.
    output_rows : int
        Output error is taken over all measured rows up to this many, else over every k-th,
        k = ceil(measured rows / output_rows).
    """

    needed_share: float = 1.0
    sink_share: float = 0.1
    sink_distance: int = 64
    output_rows: int = 256


class HeadMeasures:
    """Collects what is measured in one head of one request.

    Attributes
    ----------
    mass : float32 [pair, query head, row], NaN where a row is not measured
    hits, misses : int64 [pair, row]
    error : float64 [pair], output errors summed over `error_rows` rows and the query heads
    error_rows : int64 [pair]
    selects : bool [pair], pairs whose queries read less than is held: `add_read` measures them
    """

    def __init__(
        self, head: Head, first_rows: Longs, options: Measures, selects: NDArray[np.bool_]
    ) -> None:
        pairs = len(first_rows)
        self.selects = selects
        self.head = head
        self.first_rows = first_rows
        self.options = options
        self.mass = np.full((pairs, head.group, head.tokens), np.nan, dtype=np.float32)
        self.hits = np.zeros((pairs, head.tokens), dtype=np.int64)
        self.misses = np.zeros((pairs, head.tokens), dtype=np.int64)
        self.error = np.zeros(pairs)
        self.error_rows = np.zeros(pairs, dtype=np.int64)
        self.strides = np.maximum(1, -(-(head.tokens - first_rows) // options.output_rows))
        self.sink_distance = min(options.sink_distance, head.tokens // 4)
        self.far = np.zeros((head.group, head.tokens))

    def add(self, block: Block, evicted_at: NDArray[np.int32]) -> None:
        """Measure a block whose decisions have been made (`evicted_at` [pair, token])."""
        add_far(block.attention, block.start, self.sink_distance, self.far)
        active = np.flatnonzero((self.first_rows < block.stop) & ~self.selects)
        if not len(active):
            return
        gone = np.ascontiguousarray(evicted_at[active, : block.stop].T)
        rows = np.arange(block.start, block.stop)
        measured = self.first_rows[active, None] <= rows
        measured &= self.head.has_query[block.start : block.stop]
        mass = kept_mass(block, gone).transpose(2, 0, 1)
        window = slice(block.start, block.stop)
        self.mass[active, :, window] = np.where(measured[:, None], mass, np.nan)
        needed = np.diff(block.needed.starts[:: self.head.group])
        hits = np.zeros((len(rows), len(active)), dtype=np.int32)
        count_hits(block.needed.starts, block.needed.keys, self.head.group, block.start, gone, hits)
        self.hits[active, window] = np.where(measured, hits.T, 0)
        self.misses[active, window] = np.where(measured, needed - hits.T, 0)
        if self.head.v is not None:
            self._add_error(block, gone, active, measured, rows)

    def add_read(self, block: Block, pairs: slice, rows: Longs, read: NDArray[np.bool_]) -> None:
        """Measure pairs whose queries at `rows` read `read` [pair, row, key]."""
        at = rows - block.start
        attention = block.attention[:, at]
        needed = attention >= (self.options.needed_share / (rows + 1))[:, None]
        needed &= np.arange(block.stop) <= rows[:, None]
        for p, visible in zip(range(pairs.start, pairs.stop), read, strict=True):
            kept = np.where(visible, attention, np.float32(0))
            self.mass[p][:, rows] = kept.sum(axis=2, dtype=np.float64)
            self.hits[p, rows] = (needed & visible).sum(axis=(0, 2))
            self.misses[p, rows] = (needed & ~visible).sum(axis=(0, 2))
            sampled = (rows - self.first_rows[p]) % self.strides[p] == 0
            if block.head.v is not None and sampled.any():
                full = _OutputsOf(block, at[sampled])
                self.error[p] += full.errors(np.ascontiguousarray(kept[:, sampled])).sum()
                self.error_rows[p] += int(sampled.sum())

    def _add_error(
        self,
        block: Block,
        gone: NDArray[np.int32],
        active: Longs,
        measured: NDArray[np.bool_],
        rows: Longs,
    ) -> None:
        offsets = rows - self.first_rows[active, None]
        sampled = measured & (offsets % self.strides[active, None] == 0)
        # Pairs that decide at the same time share their sample.
        patterns, of_pair = np.unique(sampled, axis=0, return_inverse=True)
        for p, pattern in enumerate(patterns):
            which = np.flatnonzero(of_pair == p)
            if pattern.any():
                errors = output_errors(block, gone[:, which], np.flatnonzero(pattern))
                self.error[active[which]] += errors.sum(axis=(1, 2))
                self.error_rows[active[which]] += int(pattern.sum())

    def sinks(self) -> NDArray[np.bool_]:
        """[query head, key]: the sinks of the full cache that the model itself still sees."""
        tokens = self.head.tokens
        queries = np.append(0, self.head.has_query.cumsum())
        first = np.minimum(np.arange(tokens) + self.sink_distance + 1, tokens)
        last = np.minimum(np.arange(tokens) + (self.head.window or tokens), tokens)
        count = np.maximum(queries[last] - queries[first], 0)
        seen = (count > 0) & (left_window(tokens, self.head.window) == NEVER)
        mean = self.far / np.maximum(count, 1)
        found: NDArray[np.bool_] = seen & (mean >= self.options.sink_share)
        return found


def kept_mass(block: Block, gone: NDArray[np.int32]) -> NDArray[np.float32]:
    """Attention on held keys and on the query's own token: float32 [query head, row, pair].

    `gone` [key, pair] is the row after which each pair evicted a key.
    """
    group, rows, stop = block.attention.shape
    pairs = gone.shape[1]
    held = np.zeros((-(-pairs // PANEL), stop, PANEL), dtype=np.float32)
    inside = held_at_end(gone, block.start, stop, held)
    flat = block.attention.reshape(-1, stop)
    mass = np.concatenate([flat @ panel for panel in held], axis=1)
    mass = np.ascontiguousarray(mass[:, :pairs]).reshape(group, rows, pairs)
    if inside:
        add_back(block.attention, block.start, gone, mass)
    return mass


def output_errors(block: Block, gone: NDArray[np.int32], rows: Longs) -> Doubles:
    """Relative output error ||o_S - o|| / ||o|| of some rows: float64 [pair, query head, row].

    o_S is renormalised over the kept keys (and a learned sink's share, where there is one).
    `rows` index into the block.

    Raises
    ------
    ValueError
        Where the trace has no values.
    """
    full = _OutputsOf(block, rows)
    kept = np.empty((block.head.group, len(rows), block.stop), dtype=np.float32)
    errors = np.empty((gone.shape[1], *full.size.shape))
    for p, evicted_at in enumerate(np.ascontiguousarray(gone.T)):
        keep_held(block.attention, block.start, rows, evicted_at, kept)
        errors[p] = full.errors(kept)
    return errors


class _OutputsOf:
    """The outputs of some rows of a block with the full cache, and errors against them."""

    def __init__(self, block: Block, rows: Longs) -> None:
        if block.head.v is None:
            raise ValueError("output error needs values")
        # A column of ones beside the values: the same product gives what o_S is renormalised by.
        values = block.head.v[: block.stop]
        self.values = np.column_stack([values, np.ones(block.stop, np.float32)])
        self.sink = block.sink_share[:, rows]
        attention = np.ascontiguousarray(block.attention[:, rows])
        self.full = _outputs(attention, self.values, self.sink)
        self.size = np.linalg.norm(self.full, axis=2)

    def errors(self, kept: NDArray[np.float32]) -> Doubles:
        """||o_S - o|| / ||o|| where `kept` [query head, row, key] is what is left of the rows."""
        apart = np.linalg.norm(_outputs(kept, self.values, self.sink) - self.full, axis=2)
        return np.where(self.size > 0, apart / np.where(self.size > 0, self.size, 1.0), 0.0)


def _outputs(attention: NDArray[np.float32], values: NDArray[np.float32], sink: Doubles) -> Doubles:
    """Renormalised attention outputs [query head, row, value_dim]."""
    sums = attention.reshape(-1, attention.shape[2]) @ values
    sums = sums.reshape(*attention.shape[:2], -1).astype(np.float64)
    total = sums[..., -1] + sink
    # A row that keeps nothing has no output to speak of: zero, as the sum of no values.
    return np.asarray(sums[..., :-1] / np.where(total > 0, total, 1.0)[..., None])
