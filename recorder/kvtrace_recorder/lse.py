"""Log-sum-exp of attention rows, from the queries and keys as they are stored.

Computed from the stored values rather than the model's own, so that the attention a reader
recomputes sums to one exactly; with float16 storage the rounding of a score then cancels in all
but the differences between keys.

All in small matrix products: above 2**18 multiplications OpenBLAS takes several threads, which
fight with the model's for the cores (on a loaded machine that made this ten times slower).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec

Float = NDArray[np.float32]
Positions = NDArray[np.int64]

#: Keys of one matrix product.
TILE = 128
#: Multiplications of one matrix product.
PRODUCT = 1 << 18
#: Tiles whose scores are held at a time.
TILES_HELD = 64


class KeyHistory:
    """The keys of one request in one layer, growing: float32, in tiles of `TILE` tokens."""

    def __init__(self) -> None:
        self._keys: Float | None = None
        self.tokens = 0

    def extend(self, keys: NDArray[Any]) -> None:
        """Add `keys [token, kv_head, head_dim]`; memory at least doubles when it must grow."""
        count, heads, width = keys.shape
        if not count:
            return
        total = self.tokens + count
        if self._keys is None or total > self._keys.shape[1]:
            held = 0 if self._keys is None else self._keys.shape[1]
            room = -(-max(2 * held, total) // TILE) * TILE
            # Numbers: the end of the last tile is multiplied before it is hidden.
            grown = np.zeros((heads, room, width), np.float32)
            if self._keys is not None:
                grown[:, : self.tokens] = self._keys[:, : self.tokens]
            self._keys = grown
        self._keys[:, self.tokens : total] = keys.transpose(1, 0, 2)
        self.tokens = total

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens."""
        self.tokens = min(self.tokens, tokens)

    def part(self, start: int, stop: int) -> Float:
        """A copy of the keys of some tokens: [token, kv_head, head_dim]."""
        if self._keys is None:
            return np.empty((0, 0, 0), np.float32)
        return self._keys[:, start : min(stop, self.tokens)].transpose(1, 0, 2).copy()

    @property
    def tiles(self) -> Float:
        """[kv_head, tile, token of the tile, head_dim]; a view, finite behind the last token."""
        if self._keys is None:
            return np.empty((0, 0, TILE, 0), np.float32)
        heads, room, width = self._keys.shape
        return self._keys.reshape(heads, room // TILE, TILE, width)


def row_lse(
    q: NDArray[Any], history: KeyHistory, first: int, spec: LayerSpec, sinks: Float | None = None
) -> Float:
    """Log-sum-exp of the rows at positions `first`, `first + 1`, ...

    Parameters
    ----------
    q : numpy.ndarray
        [row, q_head, head_dim].
    history : KeyHistory
        Keys of the positions from 0 up to at least the last row's.
    first : int
        Position of row 0.
    spec : LayerSpec
        Gives scale, softcap, window, ALiBi's slopes and whether the layer is causal.
    sinks : numpy.ndarray, optional
        [q_head], a further logit in each head's softmax.

    Returns
    -------
    numpy.ndarray
        [row, q_head] float32.
    """
    rows, q_heads, width = q.shape
    tiles = history.tiles
    kv_heads = len(tiles)
    group = q_heads // kv_heads
    scaled = q.astype(np.float32) * np.float32(spec.scale)
    by_head = scaled.reshape(rows, kv_heads, group, width).transpose(1, 0, 2, 3)
    logits = None if sinks is None else sinks.reshape(kv_heads, 1, group)
    alibi = spec.alibi_slopes
    slopes = None if alibi is None else np.array(alibi, np.float32).reshape(kv_heads, 1, group)
    found = np.empty((kv_heads, rows, group), np.float32)
    # The row of a decode step takes all heads at once, the rows of a prompt one head at a time.
    heads = kv_heads if rows == 1 else 1
    height = max(1, PRODUCT // (TILE * width * group))
    for start in range(0, rows, height):
        stop = min(rows, start + height)
        positions = first + np.arange(start, stop)
        low, high = _bounds(positions, history.tokens, spec)
        low, high = np.repeat(low, group), np.repeat(high, group)
        for head in range(0, kv_heads, heads):
            some = slice(head, head + heads)
            block = by_head[some, start:stop].reshape(heads, -1, width)
            extra = None if logits is None else np.repeat(logits[some], stop - start, axis=1)
            bias = None
            if slopes is not None:
                slope = np.repeat(slopes[some], stop - start, axis=1).reshape(heads, -1)
                bias = (slope, np.repeat(positions, group))
            values = _block(block, tiles[some], low, high, spec.softcap, extra, bias)
            found[some, start:stop] = values.reshape(heads, stop - start, group)
    return np.ascontiguousarray(found.transpose(1, 0, 2)).reshape(rows, q_heads)


def _bounds(rows: Positions, tokens: int, spec: LayerSpec) -> tuple[Positions, Positions]:
    """First and last position that each row sees."""
    if spec.attention_kind in ("bidirectional", "cross"):
        return np.zeros_like(rows), np.full_like(rows, tokens - 1)
    if spec.sliding_window is None:
        return np.zeros_like(rows), rows
    return np.maximum(0, rows - spec.sliding_window + 1), rows


def _block(
    queries: Float,
    tiles: Float,
    low: Positions,
    high: Positions,
    softcap: float | None,
    logits: Float | None,
    bias: tuple[Float, Positions] | None,
) -> Float:
    """[head, query] of queries [head, query, head_dim] that see positions low to high.

    `bias` is ALiBi's slopes [head, query] and the queries' positions [query].
    """
    shape = queries.shape[:2]
    if logits is None:
        top, total = np.full(shape, np.finfo(np.float32).min), np.zeros(shape, np.float32)
    else:
        top, total = logits.reshape(shape), np.ones(shape, np.float32)
    first, last = int(low.min()) // TILE, int(high.max()) // TILE + 1
    for begin in range(first, last, TILES_HELD):
        some = tiles[:, begin : min(last, begin + TILES_HELD)]
        scores = queries[:, None] @ some.transpose(0, 1, 3, 2)
        if softcap is not None:
            scores /= np.float32(softcap)
            np.tanh(scores, out=scores)
            scores *= np.float32(softcap)
        if bias is not None:
            keys = begin * TILE + np.arange(scores.shape[1] * TILE).reshape(-1, 1, TILE)
            distance = (keys - bias[1][:, None]).astype(np.float32)
            scores += bias[0][:, None, :, None] * distance
        _hide(scores, begin, low, high)
        higher = np.maximum(top, scores.max(axis=3).max(axis=1))
        scores -= higher[:, None, :, None]
        total *= np.exp(top - higher)
        total += np.exp(scores, out=scores).sum(axis=3).sum(axis=1)
        top = higher
    return np.asarray(top + np.log(total))


def _hide(scores: Float, first: int, low: Positions, high: Positions) -> None:
    """Hide what the queries do not see in scores [head, tile, query, token], from tile `first`."""
    last = first + scores.shape[1]
    # Only tiles at the edges hold hidden keys; the others are left alone.
    late = range(max(first, (int(high.min()) + 1) // TILE), last)
    early = range(first, min(last, late.start, -(-int(low.max()) // TILE)))
    for tile in (*early, *late):
        positions = tile * TILE + np.arange(TILE)[None, :]
        hidden = (positions < low[:, None]) | (positions > high[:, None])
        scores[:, tile - first] += np.where(hidden, np.float32(-np.inf), np.float32(0))
