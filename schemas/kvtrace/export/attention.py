"""Attention maps of chosen layers, heads, rows and keys, as Zarr or npz.

One array a layer, `layer_<number> [head, row, key]` float32, computed and written a block of rows
at a time: memory does not grow with the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvtrace import attention
from kvtrace.errors import InputError
from kvtrace.export.map_files import MAP_FILES, Float, Ids, LayerMap
from kvtrace.export.target import new_target
from kvtrace.model import LayerData, number_text
from kvtrace.trace import Trace


@dataclass(frozen=True)
class Choice:
    """Which part of which maps; None is all.

    Attributes
    ----------
    request : int
        The request.
    layers, heads : sequence of int or None
        By the model's own numbers; heads are query heads.
    rows, keys : sequence of int or None
        Positions in the request; of a cross layer keys are those of its encoder's.
    """

    request: int = 0
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    keys: Sequence[int] | None = None


def export_attention(
    trace: Trace,
    out: Path,
    choice: Choice,
    *,
    force: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """Write the maps to `out`, a .zarr or .npz; returns the arrays' names.

    NaN stands where the row's query was not kept, 0 where the key was not visible.

    Raises
    ------
    InputError
        For a layer, head or position that the request does not have, a trace without q and k,
        another kind of file, or one that exists.
    """
    if out.suffix not in MAP_FILES:
        raise InputError(f"{out} is neither .zarr nor .npz; one of them was expected; name it so")
    maps = _maps(trace, choice)
    cells = sum(int(np.prod(part.shape)) for part in maps) or 1
    done = 0
    with new_target(out, force=force) as place, MAP_FILES[out.suffix](place) as sink:
        sink.about(_about(trace, choice, maps))
        for part in maps:
            with sink.layer(part) as write:
                for head, start, block in _blocks(trace, choice.request, part):
                    write(head, start, block)
                    done += block.size
                    progress(done / cells)
    return [part.name for part in maps]


def _maps(trace: Trace, choice: Choice) -> list[LayerMap]:
    specs = {spec.layer: spec for spec in trace.layers_of(choice.request)}
    unknown = sorted(set(choice.layers or ()) - set(specs))
    if unknown:
        raise InputError(
            f"layer {unknown[0]} was not found in request {choice.request} of {trace.path};"
            f" it has {number_text(sorted(specs))}"
        )
    rows = len(trace.request_rows(choice.request))
    found = []
    for layer in sorted(specs) if choice.layers is None else choice.layers:
        spec = specs[layer]
        heads = spec.q_head_numbers if choice.heads is None else list(choice.heads)
        for head in heads:
            spec.q_head_index(head)
        keys = len(trace.request_rows(trace.key_request(layer, choice.request)))
        found.append(
            LayerMap(
                layer,
                heads,
                _positions("rows", choice.rows, rows),
                _positions("keys", choice.keys, keys),
            )
        )
    return found


def _positions(name: str, chosen: Sequence[int] | None, tokens: int) -> Ids:
    if chosen is None:
        return np.arange(tokens)
    found = np.asarray(chosen, np.int64)
    if found.size and (found.min() < 0 or found.max() >= tokens):
        raise InputError(
            f"{name} {found.min()} to {found.max()} were asked for; the request has 0 to"
            f" {tokens - 1}; choose some of these"
        )
    return found


def _blocks(trace: Trace, request: int, part: LayerMap) -> Iterator[tuple[int, int, Float]]:
    """Index of the head, index of the first row, and [row, key]."""
    data = trace.layer_data(part.layer, request)
    for index, head in enumerate(part.heads):
        for start in range(0, len(part.rows), part.block_rows):
            rows = part.rows[start : start + part.block_rows]
            yield index, start, _weights(trace, data, head, rows, part.keys)


def _weights(trace: Trace, data: LayerData, head: int, rows: Ids, keys: Ids) -> Float:
    if data.q is None or data.k is None or data.lse is None:
        raise InputError(
            f"{trace.path} was recorded without q, k or lse; attention needs all three;"
            " record with --detail qk or qkv"
        )
    at = data.spec.q_head_index(head)
    k = data.k[keys, at // data.spec.group_size]
    lse = data.lse[rows, at]
    found = attention.weights(data.q[rows, at], k, lse, rows, keys, data.spec, at)
    found[np.isnan(lse)] = np.nan
    return np.asarray(found, np.float32)


def _about(trace: Trace, choice: Choice, maps: list[LayerMap]) -> dict[str, Any]:
    tokens = trace.tokens(choice.request)
    return {
        "trace": trace.name,
        "source": trace.manifest.source,
        "request": choice.request,
        "layers": {
            part.name: {
                "heads": part.heads,
                "rows": part.rows.tolist(),
                "keys": part.keys.tolist(),
            }
            for part in maps
        },
        "tokens": tokens["text"].to_pylist(),
    }
