"""Ranks that ran the same tokens with different heads, as under tensor parallelism: read as one.

Such a rank's layers say which of the model's KV heads it holds. Where the rows of two ranks are the
same tokens of the same requests, in the same order, and their heads are different ones of the same
layers, they are one run of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.model import Layer
from kvtrace.rank_arrays import Float, RankArrays
from kvtrace.rank_index import Ids, RankIndex


def shard_groups(indexes: Mapping[int, RankIndex]) -> list[list[RankIndex]]:
    """Ranks that are read as one, each group in the order of ranks; most are of one rank."""
    groups: list[list[RankIndex]] = []
    for rank in sorted(indexes):
        index = indexes[rank]
        group = next((one for one in groups if _belongs(index, one)), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return groups


def _belongs(index: RankIndex, group: Sequence[RankIndex]) -> bool:
    if not (_is_sharded(index) and _is_sharded(group[0])):
        return False
    held = [{(key, head) for key, spec in _layers(one).items() for head in spec.kv_head_numbers}
            for one in (index, *group)]  # fmt: skip
    return (
        _form(index) == _form(group[0])
        and all(held[0].isdisjoint(heads) for heads in held[1:])
        and _same_rows(index, group[0])
    )


def _is_sharded(index: RankIndex) -> bool:
    return bool(index.layers) and all(
        spec.model_kv_heads is not None and spec.kv_heads is not None for spec in index.layers
    )


def _layers(index: RankIndex) -> dict[tuple[int, int], Layer]:
    """By the rank's own number of the model, and the layer."""
    return {(spec.model - index.first_row, spec.layer): spec for spec in index.layers}


def _form(index: RankIndex) -> dict[tuple[int, int], Layer]:
    """Layers without what differs between the ranks."""
    plain: dict[str, Any] = {"kv_heads": None, "alibi_slopes": None, "position_bias": None}
    # How many heads a rank has need not be the same in all.
    plain |= {"model": 0, "num_q_heads": 0, "num_kv_heads": 0, "array_group": 0, "array_index": 0}
    return {key: replace(spec, **plain) for key, spec in _layers(index).items()}


def _same_rows(one: RankIndex, other: RankIndex) -> bool:
    """Whether two ranks processed the same tokens, as far as both have come."""
    found = []
    for index in (one, other):
        columns = _columns(index, "rows", ("row", "request", "position"))
        tokens = _columns(index, "tokens", ("row", "token_id"))
        found.append((columns, tokens))
    return all(
        np.array_equal(mine[:, : theirs.shape[1]], theirs[:, : mine.shape[1]])
        for mine, theirs in zip(*found, strict=True)
    )


def _columns(index: RankIndex, table: str, names: Sequence[str]) -> Ids:
    """Columns of a table in the order of the first, by the rank's own numbers."""
    found = index.table(table)
    own = {"row", "request"}
    columns = [
        found[name].fill_null(-1).to_numpy().astype(np.int64)
        - (index.first_row if name in own else 0)
        for name in names
    ]
    return np.stack(columns)[:, np.argsort(columns[0])]


class JoinedIndex(RankIndex):
    """The tables of the first rank of a group, with the layers of all.

    Parameters
    ----------
    members : sequence of RankIndex
        In the order of ranks.
    """

    def __init__(self, members: Sequence[RankIndex]) -> None:
        first = members[0]
        super().__init__(first.path, first.rank, first.store)
        self.members = members

    @property
    def rows(self) -> int:
        """Rows that every rank has."""
        return min(member.rows for member in self.members)

    @cached_property
    def layers(self) -> list[Layer]:
        """Attention layers with the heads of all ranks, rank after rank."""
        found = [_layers(member) for member in self.members]
        return [_joined([one[key] for one in found]) for key in sorted(found[0])]

    @cached_property
    def by_request(self) -> dict[int, Ids]:
        """Row of each position, as far as every rank has come."""
        rows = self.rows
        found: dict[int, Ids] = {}
        for request, held in self.members[0].by_request.items():
            beyond = np.flatnonzero(self.index(held) >= rows)
            held = held[: beyond[0]] if len(beyond) else held
            if len(held):
                found[request] = held
        return found

    @cached_property
    def has_query(self) -> NDArray[np.bool_]:
        """[index]: whether every rank kept the row's q and lse."""
        held = np.stack([one.has_query[: self.rows] for one in self.members])
        return np.asarray(held.all(axis=0))


def _joined(specs: Sequence[Layer]) -> Layer:
    first = specs[0]
    heads = [head for spec in specs for head in spec.kv_head_numbers]
    whole = heads == list(range(first.model_kv_heads or 0))
    return replace(
        first,
        num_q_heads=sum(spec.num_q_heads for spec in specs),
        num_kv_heads=len(heads),
        kv_heads=None if whole else heads,
        model_kv_heads=None if len(heads) == first.model_kv_heads else first.model_kv_heads,
        alibi_slopes=_chained([spec.alibi_slopes for spec in specs]),
        position_bias=_chained([spec.position_bias for spec in specs]),
    )


def _chained(parts: Sequence[Sequence[Any] | None]) -> list[Any] | None:
    held = [part for part in parts if part is not None]
    return [one for part in held for one in part] if len(held) == len(parts) else None


class JoinedArrays(RankArrays):
    """The arrays of a group: heads side by side.

    Parameters
    ----------
    index : JoinedIndex
        The group's tables.
    """

    def __init__(self, index: JoinedIndex) -> None:
        super().__init__(index)
        self._members = [RankArrays(member) for member in index.members]
        self._specs = [_layers(member) for member in index.members]
        self._firsts = [member.first_row for member in index.members]

    @property
    def signals(self) -> frozenset[str]:
        """What every rank recorded of every row and layer."""
        return super().signals.intersection(*(one.signals for one in self._members))

    def static(self, name: str) -> NDArray[Any]:
        """An array without a row axis; its last one is of heads."""
        return np.concatenate([one.static(name) for one in self._members], axis=-1)

    @cached_property
    def _group_kinds(self) -> dict[int, frozenset[str]]:
        found: dict[int, frozenset[str]] = {}
        for spec in self._index.layers:
            kinds = [one.kinds(own) for one, own in self._own(spec)]
            found[spec.array_group] = frozenset.intersection(*kinds)
        return found

    def _is_held(self, kind: str, spec: Layer, index: int) -> bool:
        return all(one._is_held(kind, own, index) for one, own in self._own(spec))

    def _read(self, kind: str, spec: Layer, rows: Ids) -> Float | None:
        at = self._index.index(rows)
        parts = [
            one._read(kind, own, at + first)
            for (one, own), first in zip(self._own(spec), self._firsts, strict=True)
        ]
        held = [part for part in parts if part is not None]
        return np.concatenate(held, axis=1) if len(held) == len(parts) else None

    def _own(self, spec: Layer) -> list[tuple[RankArrays, Layer]]:
        """The arrays of each rank, and what the layer is there."""
        key = (spec.model - self._index.first_row, spec.layer)
        layers = [specs[key] for specs in self._specs]
        return list(zip(self._members, layers, strict=True))
