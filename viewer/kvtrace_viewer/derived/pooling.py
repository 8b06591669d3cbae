"""Shrinking a stretch of an attention map to cells: the largest and the mean weight of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtrace.head_map import MAX_BLOCK_WEIGHTS, Weights, WeightSource


@dataclass(frozen=True)
class Pooled:
    """Cells of a shrunk map.

    Attributes
    ----------
    largest, mean
        [cell row, cell column], over the visible pairs of a cell; NaN where there are none.
    rows_per_cell
        Query rows that a cell covers.
    rows_read
        Query rows that were computed for it, at most; fewer than it covers means sampled.
    """

    largest: Weights
    mean: Weights
    rows_per_cell: int
    rows_read: int


def pool(
    source: WeightSource,
    row_edges: NDArray[np.int64],
    key_edges: NDArray[np.int64],
    max_rows_per_cell: int,
) -> Pooled:
    """Shrink a map to the cells between the given edges.

    Every key of a cell is always looked at, so that a hot key cannot vanish; rows are sampled
    evenly where a cell covers more than `max_rows_per_cell` of them.

    Parameters
    ----------
    source
        The map.
    row_edges, key_edges
        Ascending positions; cell i covers edges[i] up to, not including, edges[i + 1].
    max_rows_per_cell
        Most query rows computed for a row of cells.
    """
    num_rows, num_columns = len(row_edges) - 1, len(key_edges) - 1
    largest = np.full((num_rows, num_columns), np.nan, np.float32)
    mean = np.full((num_rows, num_columns), np.nan, np.float32)
    for index in range(num_rows):
        rows = sample(int(row_edges[index]), int(row_edges[index + 1]), max_rows_per_cell)
        if rows.size == 0:
            continue
        last_key = min(int(key_edges[-1]), source.visible_stop(int(rows[-1])))
        if last_key <= key_edges[0]:
            continue
        largest[index], mean[index] = _pool_rows(source, rows, key_edges, last_key)
    per_cell = int(np.max(np.diff(row_edges), initial=0))
    return Pooled(largest, mean, per_cell, min(per_cell, max_rows_per_cell))


def sample(start: int, stop: int, count: int) -> NDArray[np.int64]:
    """Positions from start to stop, evenly thinned to at most `count`, the last one always in."""
    total = stop - start
    if total <= count:
        return np.arange(start, stop, dtype=np.int64)
    return start + ((np.arange(1, count + 1) * total) // count) - 1


def _pool_rows(
    source: WeightSource,
    rows: NDArray[np.int64],
    key_edges: NDArray[np.int64],
    last_key: int,
) -> tuple[Weights, Weights]:
    """Largest and mean weight of one row of cells."""
    first_key = int(key_edges[0])
    width = last_key - first_key
    top = np.full(width, np.nan, np.float32)
    total = np.zeros(width, np.float64)
    count = np.zeros(width, np.int64)
    step = max(1, MAX_BLOCK_WEIGHTS // max(1, width))
    for start in range(0, rows.size, step):
        block = source.block(rows[start : start + step], first_key, last_key)
        # fmax passes over NaN, so that a pair that is not visible counts for nothing.
        top = np.fmax(top, np.fmax.reduce(block, axis=0))
        count += np.count_nonzero(~np.isnan(block), axis=0)
        total += np.nan_to_num(block, copy=False).sum(axis=0)
    return _pool_keys(top, total, count, key_edges - first_key)


def _pool_keys(
    top: Weights,
    total: NDArray[np.float64],
    count: NDArray[np.int64],
    edges: NDArray[np.int64],
) -> tuple[Weights, Weights]:
    """Reduce per-key sums of a row of cells to its cells."""
    num_cells = len(edges) - 1
    largest = np.full(num_cells, np.nan, np.float32)
    mean = np.full(num_cells, np.nan, np.float32)
    # reduceat needs starts inside the array; cells behind the last visible key stay empty.
    cells = np.flatnonzero((edges[:-1] < top.size) & (edges[1:] > edges[:-1]))
    if cells.size == 0:
        return largest, mean
    starts = edges[cells]
    cell_count = np.add.reduceat(count, starts)
    cell_total = np.add.reduceat(total, starts)
    cell_top = np.fmax.reduceat(top, starts)
    some = cell_count > 0
    largest[cells[some]] = cell_top[some]
    mean[cells[some]] = cell_total[some] / cell_count[some]
    return largest, mean
