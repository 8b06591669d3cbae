"""What one recording process kept in arrays: reading them, and what they hold of a request."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace import attention
from kvtrace.errors import InputError
from kvtrace.holdings import Holdings, first_missing
from kvtrace.layout import QUERY_ARRAYS, array_name
from kvtrace.model import Layer, LayerData
from kvtrace.rank_index import Ids, RankIndex
from kvtrace.writer import ROW_ARRAYS

Float = NDArray[np.float32]


class RankArrays:
    """The arrays of one rank.

    Parameters
    ----------
    index : RankIndex
        Its tables.
    """

    def __init__(self, index: RankIndex) -> None:
        self._index = index
        self._store = index.store

    @property
    def has_layers(self) -> bool:
        """Whether the rank ran a model."""
        return bool(self._index.layers)

    @property
    def signals(self) -> frozenset[str]:
        """What was recorded for every row and layer: of q, k, v, lse, q_prerope, wo and more.

        `received` is in it where some prompt has it; see `holdings` for one request.
        """
        groups = list(self._group_kinds.values())
        found = set(frozenset.intersection(*groups)) if groups else set()
        if self._store.has_array("wo"):
            found.add("wo")
        if not self._index.has_query.all():
            found -= QUERY_ARRAYS
        return frozenset(found - {kind for _, _, kind in self._thinned})

    def holdings(self, request: int = 0) -> Holdings:
        """What the trace holds of one request.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        rows = self._index.index(self._index.request_rows(request))
        prompt_tokens = self._index.prompt_tokens[request]
        # What is kept of a cross layer's keys is a matter of the encoder's request.
        specs = [spec for spec in self._index.layers_of(request) if not spec.is_cross]
        kinds = {spec.layer: self._stored(spec, int(rows.max())) for spec in specs}
        # Either all layers have it or none: a request that began under another rule has none, and
        # of shared or repeated prompts it is the sum over more queries than the request's.
        summed = [spec for spec in specs if "received" in kinds[spec.layer]]
        forked = request in self._index.forked_prompts
        if summed and (forked or not self._is_held("received", summed[0], int(rows[0]))):
            kinds = {layer: held - {"received"} for layer, held in kinds.items()}
        return Holdings(self._index.has_query[rows], min(prompt_tokens, len(rows)), kinds)

    def _stored(self, spec: Layer, last: int) -> frozenset[str]:
        """Row arrays of a layer that hold everything up to the index `last`."""
        thinned = {
            kind
            for (model, layer, kind), ends in self._thinned.items()
            if (model, layer) == (spec.model, spec.layer) and last >= ends
        }
        if "k" in thinned or "key_norm" in thinned:
            thinned |= set(ROW_ARRAYS)
        return self._group_kinds[spec.array_group] - thinned

    def layer_data(self, layer: int, request: int = 0) -> LayerData:
        """q, k, v, lse and received of one layer of one request, as float32."""
        rows, spec = self._index.request_rows(request), self._index.layer(layer, request)
        keys = self._index.request_rows(self._index.key_request(layer, request))
        at = {"q": rows, "k": keys, "v": keys, "lse": rows, "received": keys}
        found = {kind: self._read(kind, spec, where) for kind, where in at.items()}
        return LayerData(spec, **found)

    def attention_data(self, layer: int, request: int = 0, skipped: int = 0) -> LayerData:
        """As `Trace.attention_data`."""
        rows, spec = self._index.request_rows(request), self._index.layer(layer, request)
        keys = self._index.request_rows(self._index.key_request(layer, request))
        k, lse = self._read("k", spec, keys), self._read("lse", spec, rows)
        if not skipped or lse is None:
            return LayerData(spec, self._read("q", spec, rows), k, None, lse)
        kept = np.flatnonzero(np.isfinite(lse).all(axis=1))
        first = int(kept[skipped]) if skipped < len(kept) else len(rows)
        new = self._read("q", spec, rows[first:])
        if new is None:
            return LayerData(spec, None, k, None, lse)
        # Zeros that nobody touches take no memory.
        q = np.zeros((len(rows), *new.shape[1:]), np.float32)
        q[first:] = new
        return LayerData(spec, q, k, None, lse)

    def row_array(self, kind: str, layer: int, request: int = 0) -> Float:
        """One kind of row array (`q_prerope`, say) of one layer, by position, as float32."""
        found = self._read(
            kind, self._index.layer(layer, request), self._index.request_rows(request)
        )
        if found is None:
            raise InputError(f"{kind} was not found in {self._index.path}; it was not recorded")
        return found

    def static(self, name: str) -> NDArray[Any]:
        """An array without a row axis, such as `wo [layer, hidden, q_head*head_dim]`."""
        return self._store.static(name)

    def attention(
        self,
        layer: int,
        head: int,
        rows: slice | Ids | None = None,
        keys: slice | Ids | None = None,
        request: int = 0,
    ) -> Float:
        """As `Trace.attention`."""
        index = self._index.request_rows(request)
        spec = self._index.layer(layer, request)
        key_index = self._index.request_rows(self._index.key_request(layer, request))
        at = spec.q_head_index(head)
        row_at, key_at = _positions(rows, len(index)), _positions(keys, len(key_index))
        q = self._read("q", spec, index[row_at])
        k = self._read("k", spec, key_index[key_at])
        lse = self._read("lse", spec, index[row_at])
        if q is None or k is None or lse is None:
            raise InputError(
                f"{self._index.path} was recorded without q, k or lse; attention needs all three;"
                " record with --detail qk or qkv"
            )
        known = self._index.has_query[self._index.index(index[row_at])]
        if len(row_at) and not known.any():
            raise InputError(
                f"none of the {len(row_at)} rows asked for has its query in {self._index.path},"
                f" which kept {self.holdings(request).query_text} of the prompt's;"
                " ask for other rows"
            )
        found = attention.weights(
            q[:, at], k[:, at // spec.group_size], lse[:, at], row_at, key_at, spec, at
        )
        # Hidden keys were set to zero in these rows too.
        found[~known] = np.nan
        return np.asarray(found, np.float32)

    def kinds(self, spec: Layer) -> frozenset[str]:
        """Kinds of row arrays that a layer has a place in."""
        return self._group_kinds[spec.array_group]

    @cached_property
    def _group_kinds(self) -> dict[int, frozenset[str]]:
        """Kinds of row arrays of each group of layers."""
        groups = {layer.array_group for layer in self._index.layers}
        has = self._store.has_array
        return {
            group: frozenset(kind for kind in ROW_ARRAYS if has(array_name(kind, group)))
            for group in groups
        }

    @cached_property
    def _thinned(self) -> dict[tuple[int, int, str], int]:
        """First index that an array does not hold, by model, layer and kind; complete ones not."""
        steps, rows = self._index.table("steps"), self._index.table("rows")
        models = dict(zip(steps["step"].to_pylist(), steps["model"].to_pylist(), strict=True))
        of_row = np.array([models.get(step, -1) for step in rows["step"].to_pylist()], np.int64)
        ids = self._index.index(rows["row"].to_numpy())
        found: dict[tuple[int, int, str], int] = {}
        # An encoder's layers hold nothing of a decoder's rows, nor the other way round.
        decoders = [
            request for request, source in self._index.encoders.items() if source is not None
        ]
        of_decoder = np.isin(rows["request"].to_numpy(), decoders)
        for spec in self._index.layers:
            if spec.is_cross:
                continue
            here = (of_row == spec.model) & (ids < self._index.rows)
            if spec.model in self._index.paired_models:
                here &= of_decoder == (spec.attention_kind != "bidirectional")
            mine = ids[here]
            for kind in ("k", "v", "key_norm", "value_norm"):
                if kind in self._group_kinds[spec.array_group]:
                    ends = first_missing(mine, partial(self._is_held, kind, spec))
                    if ends is not None:
                        found[spec.model, spec.layer, kind] = ends
        return found

    def _is_held(self, kind: str, spec: Layer, index: int) -> bool:
        array = self._store.array(array_name(kind, spec.array_group))
        return bool(np.isfinite(array.read(index, index + 1, spec.array_index)).all())

    def _read(self, kind: str, spec: Layer, rows: Ids) -> Float | None:
        name = array_name(kind, spec.array_group)
        if not self._store.has_array(name):
            return None
        array = self._store.array(name)
        if not len(rows):
            return np.zeros((0, *array.shape[2:]), np.float32)
        at = self._index.index(rows)
        first, last = int(at.min()), int(at.max()) + 1
        values = array.read(first, last, spec.array_index)
        if last - first != len(at) or np.any(np.diff(at) != 1):
            values = values[at - first]
        return np.asarray(values, np.float32)


def _positions(asked: slice | Ids | None, tokens: int) -> Ids:
    if asked is None:
        return np.arange(tokens)
    if isinstance(asked, slice):
        return np.arange(tokens)[asked]
    found = np.asarray(asked, np.int64)
    if found.size and (found.min() < 0 or found.max() >= tokens):
        raise InputError(
            f"positions {found.min()} to {found.max()} were asked; the request has 0 to"
            f" {tokens - 1}"
        )
    return found
