"""Heads of a trace as maps of which any part can be computed."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from kvtrace import attention
from kvtrace.errors import InputError
from kvtrace.model import LayerData, number_text
from kvtrace.trace import Trace
from kvtrace_viewer.derived.cache import BytesCache
from kvtrace_viewer.derived.identity import identity

LAYER_CACHE_BYTES = 512 * 2**20


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

    def visible_stop(self, last_row: int) -> int:
        """One past the last key that queries up to `last_row` can see."""
        return self.num_keys if self._both_ways else last_row + 1

    def _sees_all(self, rows: NDArray[np.int64], key_stop: int) -> bool:
        """Tell at a glance whether every query sees every key, as below the diagonal."""
        if self._both_ways:
            return True
        return self._spec.sliding_window is None and key_stop - 1 <= int(rows[0])

    def block(self, rows: NDArray[np.int64], key_start: int, key_stop: int) -> NDArray[np.float32]:
        """Weights [row, key] of the query positions given.

        NaN where a query does not see a key, or was not kept.
        """
        keys = np.arange(key_start, key_stop, dtype=np.int64)
        found = attention.weights(
            self._q[rows],
            self._k[key_start:key_stop],
            self._lse[rows],
            rows,
            keys,
            self._spec,
            self._at,
        )
        if not self._sees_all(rows, key_stop):
            found[~attention.visible(rows, keys, self._spec)] = np.nan
        return cast("NDArray[np.float32]", found)


class LayerCache:
    """Layers read lately, so that the tiles and heads of one layer read it once."""

    def __init__(self, max_bytes: int = LAYER_CACHE_BYTES) -> None:
        self._layers: BytesCache[LayerData] = BytesCache(max_bytes, _num_bytes)

    def head_map(self, trace: Trace, request: int, layer: int, head: int) -> HeadMap:
        """Give a head's map.

        Raises
        ------
        InputError
            For a layer or head the trace lacks, or a trace without queries.
        """
        check_head(trace, request, layer, head)
        return HeadMap(self._layer(trace, request, layer), head)

    def head_maps(self, trace: Trace, request: int, layer: int) -> list[HeadMap]:
        """Give the maps of all query heads of a layer; raises as `head_map` does."""
        check_head(trace, request, layer)
        data = self._layer(trace, request, layer)
        return [HeadMap(data, head) for head in data.spec.q_head_numbers]

    def _layer(self, trace: Trace, request: int, layer: int) -> LayerData:
        key = (identity(trace), request, layer)
        return self._layers.get(key, lambda: _without_values(trace.layer_data(layer, request)))


def check_head(trace: Trace, request: int, layer: int, head: int | None = None) -> None:
    """Refuse a layer or query head that the request lacks."""
    heads = {spec.layer: spec.q_head_numbers for spec in trace.layers_of(request)}
    if layer not in heads:
        raise InputError(f"no layer {layer}; the request has {number_text(sorted(heads))}")
    if head is not None and head not in heads[layer]:
        raise InputError(
            f"no query head {head} in layer {layer}; it has {number_text(heads[layer])}"
        )


def _without_values(layer: LayerData) -> LayerData:
    """Drop v, which no map needs."""
    return LayerData(spec=layer.spec, q=layer.q, k=layer.k, v=None, lse=layer.lse)


def _num_bytes(layer: LayerData) -> int:
    return sum(array.nbytes for array in (layer.q, layer.k, layer.lse) if array is not None)
