"""What is measured, for all pairs of policy and budget at once, in one KV head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace_viewer.replay.block import Block, Head
from kvtrace_viewer.replay.cache import left_window
from kvtrace_viewer.replay.kernels import (
    MASS_ROWS,
    NEVER,
    PANEL,
    add_back,
    add_far,
    count_hits,
    list_events,
    masses_of,
    measure_read,
    release,
    sort_events,
    store_masses,
)
from kvtrace_viewer.replay.outputs import FullOutputs, output_errors
from kvtrace_viewer.replay.products import aligned
from kvtrace_viewer.replay.softmax import least_float

MASS_STEPS = 10_000
"""Percentiles of mass are read from a histogram over multiples of 1/10,000: good to 5e-5."""

BYTES_OF_ONE = np.uint64(0x0101010101010101)

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
    keep_reads : bool
        Also give what every query reads, of policies that choose it (`Result.reads`).
    """

    needed_share: float = 1.0
    sink_share: float = 0.1
    sink_distance: int = 64
    output_rows: int = 128
    keep_reads: bool = False


class HeadMeasures:
    """Collects what is measured in one head of one request.

    Attributes
    ----------
    mass : float32 [pair, query head, row], NaN where a row is not measured
    hits, misses : int64 [pair, row]
    error : float64 [pair], output errors summed over `error_rows` rows and the query heads
    error_rows : int64 [pair]
    selects : bool [pair], pairs whose queries read less than is held: `add_read` measures them
    as_of : the row whose query sees what `held` and `marks` say
    held : float32 [panel, token, pair of the panel], 1 or 0
    marks : uint64 [token, word], a byte per pair, 1 or 0
    """

    def __init__(
        self, head: Head, first_rows: Longs, options: Measures, selects: NDArray[np.bool_]
    ) -> None:
        pairs = len(first_rows)
        self.selects = selects
        self.as_of = 0
        panels = -(-pairs // PANEL)
        self.held = aligned(panels, head.tokens, PANEL)
        self.held[:] = 1
        self.marks = np.full((head.tokens, -(-pairs // 8)), BYTES_OF_ONE)
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
        rows = np.arange(block.start, block.stop)
        measured = self.first_rows[active, None] <= rows
        measured &= self.head.has_query[block.start : block.stop]
        events = Events.of(evicted_at, self.as_of, block.stop)
        self.as_of = block.stop - 1
        mass = self._mass(block, events, active)
        window = slice(block.start, block.stop)
        known = self.head.has_query[window]
        store_masses(mass, active, self.first_rows, known, block.start, self.mass)
        needed = np.diff(block.needed.starts[:: self.head.group])
        hits = self._hits(block, events)[:, active].T
        self.hits[active, window] = np.where(measured, hits, 0)
        self.misses[active, window] = np.where(measured, needed - hits, 0)
        if self.head.v is not None:
            self._add_error(block, evicted_at, active, measured, rows)

    def _mass(self, block: Block, events: Events, active: Longs) -> NDArray[np.float32]:
        """Attention on held keys and on the query's own token: float32 [query head, row, pair].

        Filled for the pairs in `active`. A few rows at a time by matrix products with what is
        held at the last of them; what went in between is added back.
        """
        panels = np.zeros(len(self.held), np.bool_)
        panels[active // PANEL] = True
        group, rows, _ = block.attention.shape
        mass = np.empty((group, rows, len(self.held) * PANEL), dtype=np.float32)
        released = 0
        for first in range(block.start, block.stop, MASS_ROWS):
            last = min(first + MASS_ROWS, block.stop)
            end = events.starts[last - 1 - events.first]
            release(events.pairs, events.keys, released, end, self.held)
            released = end
            part = slice(first - block.start, last - block.start)
            masses_of(block.attention[:, part], self.held, panels, mass[:, part])
            starts = events.starts[first - events.first : last - events.first]
            add_back(block.attention, block.start, first, starts, events.pairs, events.keys, mass)
        return mass

    def _hits(self, block: Block, events: Events) -> NDArray[np.int32]:
        """Needed keys that are held: int32 [row, pair], for all pairs."""
        marks = self.marks.view(np.uint8)
        starts = events.starts[block.start - events.first :]
        marks[events.keys[: starts[0]], events.pairs[: starts[0]]] = 0
        hits = np.zeros((block.stop - block.start, len(self.first_rows)), dtype=np.int32)
        count_hits(
            block.needed.starts,
            block.needed.keys,
            self.head.group,
            starts,
            events.pairs,
            events.keys,
            self.marks,
            hits,
        )
        return hits

    def add_read(self, block: Block, pairs: slice, rows: Longs, read: NDArray[np.bool_]) -> None:
        """Measure pairs whose queries at `rows` read `read` [pair, row, key]."""
        limits = least_float(self.options.needed_share / (rows + 1))
        for p, seen in zip(range(pairs.start, pairs.stop), read, strict=True):
            counts = self.mass[p], self.hits[p], self.misses[p]
            measure_read(block.attention, seen, rows, block.start, limits, *counts)
            sampled = (rows - self.first_rows[p]) % self.strides[p] == 0
            if block.head.v is not None and sampled.any():
                at = rows[sampled] - block.start
                kept = np.where(seen[sampled], block.attention[:, at], np.float32(0))
                self.error[p] += FullOutputs(block, at).errors(kept).sum()
                self.error_rows[p] += len(at)

    def _add_error(
        self,
        block: Block,
        evicted_at: NDArray[np.int32],
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
                pairs, at = active[which], np.flatnonzero(pattern)
                self.error[pairs] += output_errors(block, evicted_at, pairs, at).sum(axis=(1, 2))
                self.error_rows[pairs] += len(at)

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


@dataclass(frozen=True)
class Events:
    """What went when: keys of pairs, by the row after which they were gone.

    Attributes
    ----------
    first : int
        The first row that is told.
    starts : int64 [row + 1]
        Where each row's events begin.
    pairs, keys : int32 [event]
    """

    first: int
    starts: Longs
    pairs: NDArray[np.int32]
    keys: NDArray[np.int32]

    @classmethod
    def of(cls, evicted_at: NDArray[np.int32], first: int, stop: int) -> Events:
        """Find what of keys 0..stop-1 went after rows first..stop-1."""
        seen = evicted_at[:, :stop]
        pairs, keys = np.empty((2, seen.size), dtype=np.int32)  # of which few pages are touched
        count = list_events(seen, first, stop - 1, pairs, keys)
        starts = np.empty(stop - first + 1, dtype=np.int64)
        by_row = np.empty((2, count), dtype=np.int32)
        sort_events(seen, pairs[:count], keys[:count], first, starts, by_row)
        return cls(first, starts, *by_row)
