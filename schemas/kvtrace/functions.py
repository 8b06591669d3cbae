"""SQL functions that reach the arrays: `attention(row, layer, head)` and its like.

DuckDB calls them with vectors of up to 2,048 rows, those that the filters of a query have left,
and so nothing is computed for the others. Each vector is sorted by request, layer and head, whose
rows are then computed together from layers that were read lately.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvtrace.bytes_cache import BytesCache
from kvtrace.errors import InputError
from kvtrace.head_map import MAX_BLOCK_WEIGHTS, HeadMap
from kvtrace.model import Layer, LayerData, number_text

if TYPE_CHECKING:
    from kvtrace.trace import Trace

#: Layers kept as float32 between calls.
CACHE_BYTES = 512 * 2**20

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SqlFunction:
    """A function of SQL.

    Attributes
    ----------
    name : str
        Its name.
    parameters : tuple of str
        Names of its parameters, all of them integers.
    returns : str
        DuckDB's type.
    comment : str
        What it gives.
    """

    name: str
    parameters: tuple[str, ...]
    returns: str
    comment: str

    @property
    def signature(self) -> str:
        """As it is called."""
        return f"{self.name}({', '.join(self.parameters)})"


FUNCTIONS = (
    SqlFunction(
        "attention",
        ("row", "layer", "head"),
        "FLOAT[]",
        "Attention of a row's query, in one query head, on the keys of its request, by position:"
        " up to the row itself, or on all keys in a bidirectional or cross layer. Element 1 is"
        " position 0.",
    ),
    SqlFunction(
        "mass",
        ("row", "layer", "head", "from", "to"),
        "DOUBLE",
        "Sum of that attention over key positions from <= j < to.",
    ),
    SqlFunction(
        "queries",
        ("row", "layer", "head"),
        "FLOAT[]",
        "The query vector of a row in one query head, as it entered the attention kernel.",
    ),
    SqlFunction(
        "keys",
        ("row", "layer", "kv_head"),
        "FLOAT[]",
        "The key vector of a row in one KV head, as it entered the attention kernel.",
    ),
    SqlFunction(
        "kv_values",
        ("row", "layer", "kv_head"),
        "FLOAT[]",
        "The value vector of a row in one KV head (values is a word of SQL's own).",
    ),
)


class Group(NamedTuple):
    """Rows of one call that share request, layer and head; `at` is where they stand in it."""

    request: int
    layer: int
    head: int
    at: Ids
    positions: Ids


@dataclass(frozen=True)
class _HeldLayer:
    """A layer of a request that was read lately, and the maps of its heads: views of it."""

    data: LayerData
    heads: dict[int, HeadMap] = field(default_factory=dict)


class ArrayFunctions:
    """The functions over one open trace, with the layers they read lately.

    A row that the trace does not have, that a crop has taken back, or whose query was not kept
    gives NULL.

    Parameters
    ----------
    trace : Trace
        Where rows, layers and heads are looked up.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._layers: BytesCache[_HeldLayer] = BytesCache(CACHE_BYTES, _num_bytes)

    def register(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Let a connection call them."""
        for one in FUNCTIONS:
            # By name: the module of the enumerations is another one in each version of DuckDB.
            connection.create_function(  # type: ignore[call-overload]
                one.name,
                getattr(self, one.name),
                ["BIGINT"] * len(one.parameters),
                one.returns,
                type="arrow",
                # NULL may come out for numbers that went in.
                null_handling="special",
            )

    def attention(
        self, row: pa.ChunkedArray, layer: pa.ChunkedArray, head: pa.ChunkedArray
    ) -> pa.Array:
        """See FUNCTIONS; equally long columns of integers in, one list or null for each out."""
        found: list[Floats | None] = [None] * len(row)
        for group in self._groups(row, layer, head):
            source = self._head(group)
            for at, rows in _parts(source, group):
                stops = source.seen_by(rows)[1]
                weights = source.block(rows, 0, int(stops.max()))
                np.nan_to_num(weights, copy=False)
                for index, values, stop in zip(at, weights, stops, strict=True):
                    found[index] = values[:stop]
        return _lists(found)

    def mass(
        self,
        row: pa.ChunkedArray,
        layer: pa.ChunkedArray,
        head: pa.ChunkedArray,
        start: pa.ChunkedArray,
        stop: pa.ChunkedArray,
    ) -> Any:
        """See FUNCTIONS; positions outside the request count as its ends."""
        low, high = _integers(start), _integers(stop)
        found = np.full(len(row), np.nan)
        unsaid = _missing(start, stop)
        for group in self._groups(row, layer, head):
            source = self._head(group)
            for at, rows in _parts(source, group):
                # Plain minimum and maximum: np.clip costs as much as all the rest of one row.
                first = np.minimum(np.maximum(low[at], 0), source.num_keys)
                last = np.minimum(np.maximum(high[at], first), source.num_keys)
                keys = _covered(first, last)
                sums = np.zeros((len(rows), len(keys) + 1))
                np.cumsum(source.weights(rows, keys), axis=1, dtype=np.float64, out=sums[:, 1:])
                each, ends = np.arange(len(rows)), np.searchsorted(keys, [first, last])
                found[at] = sums[each, ends[1]] - sums[each, ends[0]]
        return pa.array(found, mask=np.isnan(found) | unsaid)

    def queries(
        self, row: pa.ChunkedArray, layer: pa.ChunkedArray, head: pa.ChunkedArray
    ) -> pa.Array:
        """See FUNCTIONS."""
        return self._vectors("q", row, layer, head)

    def keys(
        self, row: pa.ChunkedArray, layer: pa.ChunkedArray, kv_head: pa.ChunkedArray
    ) -> pa.Array:
        """See FUNCTIONS."""
        return self._vectors("k", row, layer, kv_head)

    def kv_values(
        self, row: pa.ChunkedArray, layer: pa.ChunkedArray, kv_head: pa.ChunkedArray
    ) -> pa.Array:
        """See FUNCTIONS."""
        return self._vectors("v", row, layer, kv_head)

    def _vectors(
        self, kind: str, row: pa.ChunkedArray, layer: pa.ChunkedArray, head: pa.ChunkedArray
    ) -> pa.Array:
        found: list[Floats | None] = [None] * len(row)
        for group in self._groups(row, layer, head):
            data = self._layer(group, values=kind == "v").data
            array = getattr(data, kind)
            if array is None:
                raise InputError(
                    f"{kind} of layer {group.layer} was not found; it was not recorded"
                )
            vectors = array[group.positions, _head_index(data.spec, kind, group.head)]
            held = np.isfinite(vectors).all(axis=1)
            for at, vector in zip(group.at[held], vectors[held], strict=True):
                found[at] = vector
        return _lists(found)

    def _head(self, group: Group) -> HeadMap:
        """A head's map, made once as long as its layer is held."""
        held = self._layer(group)
        if group.head not in held.heads:
            held.heads[group.head] = HeadMap(held.data, group.head)
        return held.heads[group.head]

    def _layer(self, group: Group, *, values: bool = False) -> _HeldLayer:
        """A layer of a request: what its attention needs, or its values."""

        def read() -> _HeldLayer:
            if not values:
                return _HeldLayer(self._trace.attention_data(group.layer, group.request))
            data = self._trace.layer_data(group.layer, group.request)
            return _HeldLayer(LayerData(data.spec, None, None, data.v, None))

        return self._layers.get((group.request, group.layer, values), read)

    def _groups(
        self, row: pa.ChunkedArray, layer: pa.ChunkedArray, head: pa.ChunkedArray
    ) -> Iterator[Group]:
        """Rows that the trace has, by request, layer and head, positions ascending."""
        rows = _integers(row)
        ids, requests, positions = self._rows
        if not len(ids):
            return
        place = np.minimum(np.searchsorted(ids, rows), len(ids) - 1)
        columns = [requests[place], _integers(layer), _integers(head), positions[place]]
        known = (ids[place] == rows) & ~_missing(row, layer, head)
        asked = np.stack([*columns, np.arange(len(rows))], axis=1)[known]
        asked = asked[np.lexsort(asked[:, 3::-1].T)]
        changes = np.flatnonzero(np.any(np.diff(asked[:, :3], axis=0), axis=1)) + 1
        for part in np.split(asked, changes) if len(asked) else ():
            request, of_layer, of_head = part[0, :3].tolist()
            yield Group(request, of_layer, of_head, part[:, 4], part[:, 3])

    @cached_property
    def _rows(self) -> tuple[Ids, Ids, Ids]:
        """Rows in order, the request that each was processed for, and its position there."""
        table = self._trace.table("rows")
        row, owner = table["row"].to_numpy(), table["request"].to_numpy()
        order = np.argsort(row)
        row, owner = row[order], owner[order]
        found = [self._trace.request_rows(one.request) for one in self._trace.requests()]
        if not found:
            return tuple(np.zeros(0, np.int64) for _ in range(3))  # type: ignore[return-value]
        ids = np.concatenate(found)
        numbers = [one.request for one in self._trace.requests()]
        requests = np.repeat(numbers, [len(rows) for rows in found])
        positions = np.concatenate([np.arange(len(rows)) for rows in found])
        # What a fork brought stays with the request that computed it.
        own = owner[np.searchsorted(row, ids)] == requests
        order = np.argsort(ids[own])
        return ids[own][order], requests[own][order], positions[own][order]


def _parts(source: HeadMap, group: Group) -> Iterator[tuple[Ids, Ids]]:
    """Places and positions of rows that are computed together; those without a query left out."""
    kept = source.has_queries(group.positions)
    at, positions = group.at[kept], group.positions[kept]
    step = max(1, MAX_BLOCK_WEIGHTS // max(1, source.num_keys))
    for start in range(0, len(at), step):
        yield at[start : start + step], positions[start : start + step]


def _covered(first: Ids, last: Ids) -> Ids:
    """Keys that lie in any of some ranges [first, last), ascending."""
    start = int(first.min())
    if len(first) == 1:
        return np.arange(start, int(last[0]))
    steps = np.zeros(int(last.max()) - start + 1, np.int64)
    np.add.at(steps, first - start, 1)
    np.add.at(steps, last - start, -1)
    return start + np.flatnonzero(np.cumsum(steps) > 0)


def _head_index(spec: Layer, kind: str, head: int) -> int:
    """Where a query head, or a KV head, stands in the arrays."""
    if kind == "q":
        return spec.q_head_index(head)
    if head not in spec.kv_head_numbers:
        raise InputError(
            f"KV head {head} was not found in layer {spec.layer}; it has"
            f" {number_text(spec.kv_head_numbers)}"
        )
    return spec.kv_head_numbers.index(head)


def _integers(column: pa.ChunkedArray) -> Ids:
    return np.asarray(column.fill_null(0).to_numpy(), np.int64)


def _missing(*columns: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where any of some columns is null."""
    return np.asarray(np.any([column.is_null().to_numpy() for column in columns], axis=0))


def _lists(found: Sequence[Floats | None]) -> pa.Array:
    """Lists of float32 as Arrow, null for None."""
    ends = np.cumsum([0, *(0 if values is None else len(values) for values in found)])
    held = [values for values in found if values is not None]
    flat = np.concatenate(held) if held else np.zeros(0, np.float32)
    missing = pa.array([values is None for values in found], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat), mask=missing)


def _num_bytes(layer: _HeldLayer) -> int:
    arrays = (layer.data.q, layer.data.k, layer.data.v, layer.data.lse)
    return sum(array.nbytes for array in arrays if array is not None)
