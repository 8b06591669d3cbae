"""Log-sum-exp of attention rows, from the queries and keys as they are stored.

Computed from the stored values rather than the model's own, so that the attention a reader
recomputes sums to one exactly; with float16 storage the rounding of a score then cancels in all
but the differences between keys.

One matrix product for as many rows as keep their scores in a core's cache: the writer's process
has one thread, and what it takes of the machine the model lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.attention import bias_index
from kvtrace.writer import LayerSpec

Float = NDArray[np.float32]
Positions = NDArray[np.int64]

#: Scores held at a time, of all rows and keys of one product: 2 MB.
SCORES = 1 << 19
#: e to less than this is lost in any sum, and denormal numbers take a CPU many times as long.
LEAST_EXPONENT = np.float32(-80)
#: A key history grows by at least so many tokens.
ROOM = 128


class KeyHistory:
    """The keys of one request in one layer, growing: float32."""

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
            grown = np.empty((heads, max(2 * held, total, ROOM), width), np.float32)
            if self._keys is not None:
                grown[:, : self.tokens] = self._keys[:, : self.tokens]
            self._keys = grown
        self._keys[:, self.tokens : total] = keys.transpose(1, 0, 2)
        self.tokens = total

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return 0 if self._keys is None else self._keys.nbytes

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens."""
        self.tokens = min(self.tokens, tokens)

    def part(self, start: int, stop: int) -> Float:
        """A copy of the keys of some tokens: [token, kv_head, head_dim]."""
        if self._keys is None:
            return np.empty((0, 0, 0), np.float32)
        return self._keys[:, start : min(stop, self.tokens)].transpose(1, 0, 2).copy()

    @property
    def keys(self) -> Float:
        """[kv_head, token, head_dim]; a view."""
        if self._keys is None:
            return np.empty((0, 0, 0), np.float32)
        return self._keys[:, : self.tokens]


def row_lse(
    q: NDArray[Any],
    history: KeyHistory,
    positions: Positions,
    spec: LayerSpec,
    sinks: Float | None = None,
    received: Float | None = None,
) -> Float:
    """Log-sum-exp of some rows of a request.

    Parameters
    ----------
    q : numpy.ndarray
        [row, q_head, head_dim].
    history : KeyHistory
        Keys of the positions from 0 up to at least the last row's.
    positions : numpy.ndarray
        [row], ascending.
    spec : LayerSpec
        Gives scale, softcap, window, ALiBi's slopes and whether the layer is causal.
    sinks : numpy.ndarray, optional
        [q_head], a further logit in each head's softmax.
    received : numpy.ndarray, optional
        [q_head, key] of the history's keys; what they receive from these rows, after the softmax,
        is added.

    Returns
    -------
    numpy.ndarray
        [row, q_head] float32.
    """
    rows, q_heads, width = q.shape
    keys = history.keys
    kv_heads = len(keys)
    group = q_heads // kv_heads
    scaled: Float = q.astype(np.float32) * np.float32(spec.scale)
    by_head = scaled.reshape(rows, kv_heads, group, width).transpose(1, 0, 2, 3)
    found = np.empty((kv_heads, rows, group), np.float32)
    height = max(1, SCORES // (max(1, history.tokens) * group))
    for start in range(0, rows, height):
        stop = min(rows, start + height)
        at = positions[start:stop]
        low, high = _bounds(at, history.tokens, spec)
        begin, end = int(low.min()), int(high.max()) + 1
        for head in range(kv_heads):
            queries = by_head[head, start:stop].reshape(-1, width)
            product: Float = queries @ keys[head, begin:end].T
            scores: Float = product.reshape(stop - start, group, end - begin)
            _bend(scores, spec, slice(head * group, (head + 1) * group), at, begin)
            _hide(scores, low - begin, high - begin)
            mine = slice(head * group, (head + 1) * group)
            top, total = _exponentials(scores, None if sinks is None else sinks[mine])
            found[head, start:stop] = top + np.log(total)
            if received is not None:
                for one in range(group):
                    received[mine][one, begin:end] += (1 / total[:, one]) @ scores[:, one]
    return np.ascontiguousarray(found.transpose(1, 0, 2)).reshape(rows, q_heads)


def _bounds(rows: Positions, tokens: int, spec: LayerSpec) -> tuple[Positions, Positions]:
    """First and last position that each row sees."""
    if spec.attention_kind in ("bidirectional", "cross"):
        return np.zeros_like(rows), np.full_like(rows, tokens - 1)
    if spec.sliding_window is None:
        return np.zeros_like(rows), rows
    return np.maximum(0, rows - spec.sliding_window + 1), rows


def _bend(scores: Float, spec: LayerSpec, heads: slice, rows: Positions, first_key: int) -> None:
    """Apply softcap and biases to scores [row, head, key] of keys from `first_key` on."""
    if spec.softcap is not None:
        scores /= np.float32(spec.softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(spec.softcap)
    if spec.alibi_slopes is not None:
        slopes = np.array(spec.alibi_slopes[heads], np.float32)
        keys = first_key + np.arange(scores.shape[2])
        distance = (keys[None, :] - rows[:, None]).astype(np.float32)
        scores += slopes[None, :, None] * distance[:, None, :]
    if spec.position_bias is not None:
        table = np.array(spec.position_bias[heads], np.float32)
        keys = first_key + np.arange(scores.shape[2])
        scores += table[:, bias_index(table.shape[1], rows, keys)].transpose(1, 0, 2)


def _hide(scores: Float, low: Positions, high: Positions) -> None:
    """Hide all but keys low to high of scores [row, head, key]."""
    keys = np.arange(scores.shape[2])
    # Only keys at the edges are hidden from some rows; the others are left alone.
    late, early = int(high.min()) + 1, int(low.max())
    if late < len(keys):
        hidden = keys[None, late:] > high[:, None]
        np.copyto(scores[:, :, late:], -np.inf, where=hidden[:, None, :])
    if early:
        hidden = keys[None, :early] < low[:, None]
        np.copyto(scores[:, :, :early], -np.inf, where=hidden[:, None, :])


def _exponentials(scores: Float, sinks: Float | None) -> tuple[Float, Float]:
    """Largest logit and sum of exponentials, [row, head] both, of scores [row, head, key].

    The scores become their exponentials, relative to the largest; `sinks` is a further logit a
    head.
    """
    top = scores.max(axis=2)
    if sinks is not None:
        top = np.maximum(top, sinks[None, :])
    scores -= top[:, :, None]
    np.maximum(scores, LEAST_EXPONENT, out=scores)
    total = np.exp(scores, out=scores).sum(axis=2)
    if sinks is not None:
        total += np.exp(sinks[None, :] - top)
    return np.asarray(top, np.float32), np.asarray(total, np.float32)
