"""Log-sum-exp of attention rows, from the queries and keys as they are stored.

Computed from the stored values rather than the model's own, so that the attention a reader
recomputes sums to one exactly; with float16 storage the rounding of a score then cancels in all
but the differences between keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec

Float = NDArray[np.float32]
#: Scores held at a time; a block of rows is as tall as this allows.
BLOCK_SCORES = 1 << 20


class KeyHistory:
    """The keys of one request in one layer, `[kv_head, token, head_dim]` float32, growing."""

    def __init__(self) -> None:
        self._keys: Float | None = None
        self.tokens = 0

    def extend(self, keys: NDArray[Any]) -> None:
        """Add `keys [token, kv_head, head_dim]`; memory at least doubles when it must grow."""
        count, heads, width = keys.shape
        total = self.tokens + count
        if self._keys is None or total > self._keys.shape[1]:
            held = 0 if self._keys is None else self._keys.shape[1]
            grown = np.empty((heads, max(64, 2 * held, total), width), np.float32)
            if self._keys is not None:
                grown[:, : self.tokens] = self._keys[:, : self.tokens]
            self._keys = grown
        self._keys[:, self.tokens : total] = keys.transpose(1, 0, 2)
        self.tokens = total

    @property
    def keys(self) -> Float:
        """[kv_head, token, head_dim]; a view."""
        if self._keys is None:
            return np.empty((0, 0, 0), np.float32)
        return self._keys[:, : self.tokens]


def row_lse(
    q: NDArray[Any], keys: Float, first: int, spec: LayerSpec, sinks: Float | None = None
) -> Float:
    """Log-sum-exp of the rows at positions `first`, `first + 1`, ...

    Parameters
    ----------
    q : numpy.ndarray
        [row, q_head, head_dim].
    keys : numpy.ndarray
        [kv_head, token, head_dim] of positions 0 up to at least the last row's.
    first : int
        Position of row 0.
    spec : LayerSpec
        Gives scale, softcap, window and whether the layer is causal.
    sinks : numpy.ndarray, optional
        [q_head], a further logit in each head's softmax.

    Returns
    -------
    numpy.ndarray
        [row, q_head] float32.
    """
    rows, q_heads, _ = q.shape
    tokens = keys.shape[1]
    found = np.empty((rows, q_heads), np.float32)
    height = max(1, BLOCK_SCORES // max(1, q_heads * tokens))
    for start in range(0, rows, height):
        stop = min(rows, start + height)
        low, high = _key_range(first + start, first + stop, tokens, spec)
        scores = _scores(q[start:stop], keys[:, low:high], spec)
        # The key range of a single row is exactly what it sees.
        if spec.attention_kind != "bidirectional" and stop - start > 1:
            hidden = ~_visible(np.arange(first + start, first + stop), low, high, spec)
            scores[:, hidden] = -np.inf
        found[start:stop] = _log_sum_exp(scores, sinks).T
    return found


def _key_range(first: int, last: int, tokens: int, spec: LayerSpec) -> tuple[int, int]:
    if spec.attention_kind == "bidirectional":
        return 0, tokens
    window = spec.sliding_window
    return (0 if window is None else max(0, first - window + 1)), min(last, tokens)


def _scores(q: NDArray[Any], keys: Float, spec: LayerSpec) -> Float:
    """[q_head, row, key]."""
    rows, q_heads, width = q.shape
    kv_heads = keys.shape[0]
    group = q_heads // kv_heads
    wide = q.astype(np.float32).reshape(rows, kv_heads, group, width).transpose(1, 2, 0, 3)
    scores = wide.reshape(kv_heads, group * rows, width) @ keys.transpose(0, 2, 1)
    scores *= np.float32(spec.scale)
    if spec.softcap is not None:
        cap = np.float32(spec.softcap)
        scores = cap * np.tanh(scores / cap)
    return np.asarray(scores.reshape(q_heads, rows, keys.shape[1]))


def _visible(rows: NDArray[np.int64], low: int, high: int, spec: LayerSpec) -> NDArray[np.bool_]:
    distance = rows[:, None] - np.arange(low, high)[None, :]
    seen = distance >= 0
    if spec.sliding_window is not None:
        seen &= distance < spec.sliding_window
    return np.asarray(seen)


def _log_sum_exp(scores: Float, sinks: Float | None) -> Float:
    """[q_head, row] of scores [q_head, row, key], which are overwritten."""
    top = scores.max(axis=2)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None])
    scores -= top[:, :, None]
    total = np.exp(scores, out=scores).sum(axis=2)
    if sinks is not None:
        total += np.exp(sinks[:, None] - top)
    return np.asarray(top + np.log(total))
