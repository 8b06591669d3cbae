"""Heads of a trace as maps, from layers read lately."""

from __future__ import annotations

from kvtrace.bytes_cache import BytesCache
from kvtrace.errors import InputError
from kvtrace.head_map import HeadMap
from kvtrace.model import LayerData, number_text
from kvtrace.trace import Trace
from kvtrace_viewer.derived.identity import identity

LAYER_CACHE_BYTES = 512 * 2**20


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
