"""Tiles of the zoomable map and thumbnails of the wall, as bytes ready for the canvas."""

from __future__ import annotations

import numpy as np

from kvtrace.head_map import WeightSource
from kvtrace_viewer.derived.encode import encode
from kvtrace_viewer.derived.pooling import Pooled, pool

TILE_CELLS = 256
TILE_ROWS_PER_CELL = 16
THUMB_CELLS = 48
THUMB_ROWS_PER_CELL = 8


def tile(source: WeightSource, level: int, tile_row: int, tile_column: int, scale: str) -> bytes:
    """Compute one tile.

    At level z a cell covers 2^z x 2^z (query, key) pairs and a tile 256 x 256 cells.

    Returns
    -------
    Two planes of 256 x 256 uint8, the largest weight of each cell and then the mean, coded as
    `encode` says; cells outside the map are 0.
    """
    span = TILE_CELLS << level
    cell = 1 << level
    offsets = np.arange(TILE_CELLS + 1, dtype=np.int64) * cell
    rows = np.minimum(tile_row * span + offsets, source.num_tokens)
    keys = np.minimum(tile_column * span + offsets, source.num_keys)
    return _planes(pool(source, rows, keys, TILE_ROWS_PER_CELL), scale)


def thumbnail(source: WeightSource, scale: str) -> bytes:
    """Compute a head's thumbnail: two planes of cells x cells, as `thumb_cells` says how many."""
    cells = thumb_cells(source.num_tokens)
    rows, keys = (
        np.linspace(0, count, cells + 1).astype(np.int64)
        for count in (source.num_tokens, source.num_keys)
    )
    return _planes(pool(source, rows, keys, THUMB_ROWS_PER_CELL), scale)


def thumb_cells(num_tokens: int) -> int:
    """Cells on a side of a thumbnail: 48, or one for each token of a shorter request."""
    return max(1, min(THUMB_CELLS, num_tokens))


def rows_read_per_thumb_cell(num_tokens: int) -> tuple[int, int]:
    """Query rows read and covered by a row of thumbnail cells; fewer read means sampled."""
    covered = -(-num_tokens // thumb_cells(num_tokens))
    return min(covered, THUMB_ROWS_PER_CELL), covered


def _planes(pooled: Pooled, scale: str) -> bytes:
    return encode(pooled.largest, scale).tobytes() + encode(pooled.mean, scale).tobytes()
