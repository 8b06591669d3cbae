"""One query head of a trace as a map of which any part can be computed."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvtrace import attention
from kvtrace.errors import InputError
from kvtrace.model import LayerData

Weights = NDArray[np.float32]
Hidden = NDArray[np.bool_]
Ids = NDArray[np.int64]

#: About 32 MB of float32 weights in flight.
MAX_BLOCK_WEIGHTS = 8_000_000


class WeightSource(Protocol):
    """One head's attention map, any part of it on demand: [num_tokens, num_keys]."""

    num_tokens: int
    num_keys: int

    def visible_stop(self, last_row: int) -> int:
        """One past the last key that queries up to `last_row` can see."""

    def block(self, rows: NDArray[np.int64], key_start: int, key_stop: int) -> Weights:
        """Weights [row, key] of the query positions given; NaN where a query cannot see a key."""


class HeadMap:
    """One query head's attention, computed from q, k and lse a block at a time.

    Parameters
    ----------
    layer
        The layer's data of one request; q, k and lse have to be there.
    head
        Query head, by the model's own number.
    """

    def __init__(self, layer: LayerData, head: int) -> None:
        if layer.q is None or layer.k is None or layer.lse is None:
            raise InputError(
                "this trace holds no queries; attention maps need q, k and lse; "
                "record it with --detail qkv"
            )
        at = layer.spec.q_head_index(head)
        self._spec, self._at = layer.spec, at
        self._q = layer.q[:, at]
        self._k = layer.k[:, at // layer.spec.group_size]
        self._lse = layer.lse[:, at]
        self.num_tokens = len(self._q)
        #: As many, but in a cross layer those of the encoder.
        self.num_keys = len(self._k)
        self._both_ways = layer.spec.attention_kind in ("bidirectional", "cross")

    def has_query(self, row: int) -> bool:
        """Whether a row's query was kept."""
        return bool(np.isfinite(self._lse[row]))

    def has_queries(self, rows: Ids) -> NDArray[np.bool_]:
        """Which of some rows have their query."""
        return np.asarray(np.isfinite(self._lse[rows]))

    def kept_rows(self) -> Ids:
        """Positions whose query was kept, ascending."""
        return np.flatnonzero(np.isfinite(self._lse))

    def visible_stop(self, last_row: int) -> int:
        """One past the last key that queries up to `last_row` can see."""
        return self.num_keys if self._both_ways else last_row + 1

    def seen_by(self, rows: Ids) -> tuple[Ids, Ids]:
        """First key that each query sees, and one past the last."""
        if self._both_ways:
            return np.zeros_like(rows), np.full_like(rows, self.num_keys)
        window = self._spec.sliding_window or self.num_keys
        return np.maximum(0, rows + 1 - window), rows + 1

    def seeing(self, keys: Ids) -> tuple[Ids, Ids]:
        """First query position that sees each key, and one past the last."""
        if self._both_ways:
            return np.zeros_like(keys), np.full_like(keys, self.num_tokens)
        window = self._spec.sliding_window or self.num_tokens
        return keys, np.minimum(keys + window, self.num_tokens)

    def exponents(self, rows: Ids, start: int, stop: int) -> tuple[Weights, Hidden, int]:
        """Logarithms of the weights of ascending rows on keys [start, stop).

        Returns
        -------
        exponents : numpy.ndarray
            [row, key] float32; of pairs that are not visible not to be used.
        hidden : numpy.ndarray
            [row, key from `edge` on] of bool: pairs that are not visible. All before are.
        edge : int
            Where it begins.
        """
        keys = np.arange(start, stop, dtype=np.int64)
        with np.errstate(over="ignore"):
            found = attention.scores(
                self._q[rows], self._k[start:stop], rows, keys, self._spec, self._at
            )
            found -= self._lse[rows, None]
        edge = stop - start
        if not self._sees_all(rows, stop):
            windowed = self._spec.sliding_window is not None
            edge = 0 if windowed else max(0, min(edge, int(rows[0]) + 1 - start))
        hidden = ~attention.visible(rows, keys[edge:], self._spec)
        return cast("Weights", found), hidden, edge

    def block(self, rows: Ids, key_start: int, key_stop: int) -> Weights:
        """Weights [row, key] of the query positions given, in any order.

        NaN where a query does not see a key, or was not kept.
        """
        keys = np.arange(key_start, key_stop, dtype=np.int64)
        found = self.weights(rows, keys)
        if not self._sees_all(rows, key_stop):
            found[~attention.visible(rows, keys, self._spec)] = np.nan
        return found

    def weights(self, rows: Ids, keys: Ids) -> Weights:
        """Weights [row, key] of any queries on any keys, zero where not visible."""
        found = attention.weights(
            self._q[rows], self._k[keys], self._lse[rows], rows, keys, self._spec, self._at
        )
        return cast("Weights", found)

    def _sees_all(self, rows: Ids, key_stop: int) -> bool:
        """Tell at a glance whether every query sees every key, as below the diagonal."""
        if self._both_ways:
            return True
        return self._spec.sliding_window is None and key_stop - 1 <= int(rows[0])
