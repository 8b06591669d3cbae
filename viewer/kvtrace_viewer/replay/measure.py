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
    """

    def __init__(self, head: Head, first_rows: Longs, options: Measures) -> None:
        pairs = len(first_rows)
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
        active = np.flatnonzero(self.first_rows < block.stop)
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
    if block.head.v is None:
        raise ValueError("output error needs values")
    # A column of ones beside the values: the same product gives what o_S is renormalised by.
    values = np.column_stack([block.head.v[: block.stop], np.ones(block.stop, np.float32)])
    sink = block.sink_share[:, rows]
    full = _outputs(np.ascontiguousarray(block.attention[:, rows]), values, sink)
    size = np.linalg.norm(full, axis=2)
    kept = np.empty((block.head.group, len(rows), block.stop), dtype=np.float32)
    errors = np.empty((gone.shape[1], *size.shape))
    for p, evicted_at in enumerate(np.ascontiguousarray(gone.T)):
        keep_held(block.attention, block.start, rows, evicted_at, kept)
        apart = np.linalg.norm(_outputs(kept, values, sink) - full, axis=2)
        errors[p] = np.where(size > 0, apart / np.where(size > 0, size, 1.0), 0.0)
    return errors


def _outputs(attention: NDArray[np.float32], values: NDArray[np.float32], sink: Doubles) -> Doubles:
    """Renormalised attention outputs [query head, row, value_dim]."""
    sums = attention.reshape(-1, attention.shape[2]) @ values
    sums = sums.reshape(*attention.shape[:2], -1).astype(np.float64)
    total = sums[..., -1] + sink
    # A row that keeps nothing has no output to speak of: zero, as the sum of no values.
    return np.asarray(sums[..., :-1] / np.where(total > 0, total, 1.0)[..., None])
