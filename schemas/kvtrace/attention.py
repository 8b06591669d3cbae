"""Attention from its causes: tiles of the map recomputed from q, k and the log-sum-exp."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.model import Layer

Float = NDArray[np.floating[Any]]
Positions = NDArray[np.int64]


def scores(q: Float, k: Float, rows: Positions, keys: Positions, layer: Layer, head: int) -> Float:
    """Scores of some queries on some keys as the softmax takes them, nothing masked.

    Parameters
    ----------
    q : numpy.ndarray
        [row, head_dim] of one query head, float32 or wider.
    k : numpy.ndarray
        [key, head_dim] of its KV head.
    rows, keys : numpy.ndarray
        Positions in the request.
    layer : Layer
        Gives scale, softcap and biases by position.
    head : int
        The query head.

    Returns
    -------
    numpy.ndarray
        [row, key].
    """
    found: Float = (q @ k.T) * q.dtype.type(layer.scale)
    if layer.softcap is not None:
        cap = q.dtype.type(layer.softcap)
        found = cap * np.tanh(found / cap)
    if layer.alibi_slopes is not None:
        distance = keys[None, :] - rows[:, None]
        found += q.dtype.type(layer.alibi_slopes[head]) * distance.astype(q.dtype)
    if layer.position_bias is not None:
        table = np.array(layer.position_bias[head], q.dtype)
        found += table[bias_index(len(table), rows, keys)]
    return found


def bias_index(length: int, rows: Positions, keys: Positions) -> Positions:
    """Where a table of `length` numbers by distance has each pair's: [row, key]."""
    reach = length // 2
    return np.asarray(np.clip(keys[None, :] - rows[:, None], -reach, reach) + reach)


def visible(rows: Positions, keys: Positions, layer: Layer) -> NDArray[np.bool_]:
    """Which keys each query could see: [row, key] of bool, from positions in the request.

    Of a cross layer the keys' positions are those in the encoder's request.
    """
    if layer.attention_kind in ("bidirectional", "cross"):
        return np.ones((len(rows), len(keys)), bool)
    distance = rows[:, None] - keys[None, :]
    seen = distance >= 0
    if layer.sliding_window is not None:
        seen &= distance < layer.sliding_window
    return np.asarray(seen)


def weights(
    q: Float, k: Float, lse: Float, rows: Positions, keys: Positions, layer: Layer, head: int
) -> Float:
    """Attention of queries at `rows` on keys at `keys`.

    Parameters
    ----------
    q : numpy.ndarray
        [row, head_dim] of one query head.
    k : numpy.ndarray
        [key, head_dim] of its KV head.
    lse : numpy.ndarray
        [row], log-sum-exp of the whole row as the model had it.
    rows, keys : numpy.ndarray
        Positions in the request.
    layer : Layer
        Gives scale, softcap, window, ALiBi's slopes.
    head : int
        The query head.

    Returns
    -------
    numpy.ndarray
        [row, key]; zero where the key was not visible.
    """
    with np.errstate(over="ignore"):
        # Keys that the query could not see are not in its lse: their exponent has no bound.
        found = np.exp(scores(q, k, rows, keys, layer, head) - lse[:, None])
    found[~visible(rows, keys, layer)] = 0
    return found
