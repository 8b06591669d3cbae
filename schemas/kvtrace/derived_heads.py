"""The tables of heads and keys, a layer of a request at a time, and what is kept to go on from."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtrace.derived_parts import Columns, PartWriter
from kvtrace.head_map import HeadMap
from kvtrace.head_sums import HeadSums, Subtotal, block_rows, head_sums
from kvtrace.marks import sink_distance

if TYPE_CHECKING:
    from kvtrace.model import Layer, LayerData


_ARRAYS = ("received", "far", "of_rows")


@dataclass(frozen=True)
class LayerSums:
    """What the first rows of a layer add up to, in each of its heads.

    Attributes
    ----------
    distance, step : int
        What they were computed by: how far is far, and how many rows at a time.
    rows : int
        Kept rows that are in the sums.
    received, far : numpy.ndarray
        [head, key]
    of_rows : numpy.ndarray
        [head, 4]; see `head_sums.Subtotal`.
    """

    distance: int
    step: int
    rows: int
    received: NDArray[np.float64]
    far: NDArray[np.float64]
    of_rows: NDArray[np.float64]

    def of_head(self, at: int) -> Subtotal:
        """Those of one head, by its place in the arrays."""
        return Subtotal(self.rows, self.received[at], self.far[at], self.of_rows[at])


def _read_sums(file: Path) -> LayerSums | None:
    if not file.exists():
        return None
    with np.load(file) as found:
        distance, step, rows = (int(found[name]) for name in ("distance", "step", "rows"))
        return LayerSums(distance, step, rows, *(found[name] for name in _ARRAYS))


def save_sums(file: Path, sums: LayerSums) -> None:
    """Save what a layer's first rows add up to."""
    np.savez(file, allow_pickle=False, **vars(sums))


def fitting(file: Path, spec: Layer, tokens: int, keys: int) -> LayerSums | None:
    """What was saved of a layer, where a request of so many tokens and keys goes on from it."""
    # A short request's distance grows with it, and an encoder's old rows see its new keys.
    found = None if spec.attention_kind == "bidirectional" else _read_sums(file)
    if found and (found.distance, found.step) == (sink_distance(tokens), block_rows(keys)):
        return found
    return None


def write_heads(
    writer: PartWriter, request: int, data: LayerData, before: LayerSums | None, pool: Executor
) -> LayerSums | None:
    """Write what the tables of heads and keys hold of a layer.

    Parameters
    ----------
    writer : PartWriter
        Where to.
    request : int
        The request.
    data : LayerData
        q, k and lse of its layer; of the rows that `before` has, q is not looked at.
    before : LayerSums or None
        What its first rows add up to, where that is known.
    pool : concurrent.futures.Executor
        Computes the heads side by side.

    Returns
    -------
    LayerSums or None
        What to go on from when the request has grown; None where no query was kept.
    """
    if data.q is None or data.k is None or data.lse is None or not np.isfinite(data.lse).any():
        return None
    spec, distance = data.spec, sink_distance(len(data.q))
    one_head = partial(_sums_of_head, data, distance, before)
    found = list(pool.map(one_head, range(spec.num_q_heads)))
    for at, sums in enumerate(found):
        _write_head(writer, request, spec, at, sums, distance)
    whole = [sums.whole_blocks for sums in found]
    arrays = (np.stack([getattr(one, name) for one in whole]) for name in _ARRAYS)
    return LayerSums(distance, block_rows(len(data.k)), whole[0].rows, *arrays)


def _sums_of_head(data: LayerData, distance: int, before: LayerSums | None, at: int) -> HeadSums:
    head = HeadMap(data, data.spec.q_head_numbers[at])
    return head_sums(head, distance, before.of_head(at) if before else None)


def _write_head(
    writer: PartWriter, request: int, spec: Layer, at: int, sums: HeadSums, distance: int
) -> None:
    names: Columns = {
        "request": request,
        "layer": spec.layer,
        "q_head": spec.q_head_numbers[at],
        "kv_head": spec.kv_head_numbers[at // spec.group_size],
    }
    values = {**names, **_head_values(spec, sums, distance)}
    writer.add("head_attention", {name: [value] for name, value in values.items()})
    if not spec.is_cross:
        writer.add("key_attention", _key_columns(names, sums))


def _head_values(spec: Layer, sums: HeadSums, distance: int) -> Columns:
    rows, keys = sums.rows, sums.keys
    # Positions of a cross layer's queries and keys are of two sequences: nothing is near.
    own = not spec.is_cross and len(keys.far) > 0
    far = own and keys.far_queries[0] > 0
    return {
        "queries": rows.queries,
        "entropy": rows.entropy,
        "entropy_share": rows.entropy_share,
        "sparsity": rows.sparsity,
        "local_distance": distance if own else None,
        "local_share": rows.local_share if own else None,
        "first_token_share": float(keys.far[0] / keys.far_queries[0]) if far else None,
    }


def _key_columns(names: Columns, sums: HeadSums) -> Columns:
    keys = sums.keys
    count = len(keys.received)
    return {
        **{name: np.full(count, value) for name, value in names.items()},
        "position": np.arange(count),
        "queries": keys.queries,
        "received": keys.received,
        "uniform": keys.uniform,
        "far_queries": keys.far_queries,
        "far_received": keys.far,
        "seen_at_end": keys.seen_at_end,
    }
