"""Rows on their way to the writer's memory: gathered over steps, ordered, narrowed, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.layer_rows import LayerRows, Summed
from kvtrace_recorder.session.held_lse import held_lse
from kvtrace_recorder.session.requests import Bools
from kvtrace_recorder.session.step import ActiveStep, Hold, Taken
from kvtrace_recorder.taps.keep import (
    Sums,
    into_slab,
    is_off_host,
    norms,
    of_heads,
    sums_to_host,
)
from kvtrace_recorder.writer.slabs import Slab, room_for

#: What each kind of row array is made from.
SOURCES = {"q": "q", "k": "k", "v": "v", "key_norm": "k", "value_norm": "v"}


@dataclass(slots=True)
class Part:
    """Tokens [first, first + length) of a tensor [batch, head, token, width]."""

    tensor: torch.Tensor
    first: int
    length: int

    @property
    def view(self) -> torch.Tensor:
        """[batch, head, length, width]."""
        return self.tensor[:, :, self.first : self.first + self.length]


@dataclass(frozen=True)
class RowChoice:
    """Which rows of some steps are written.

    Attributes
    ----------
    count : int
        Rows that are written.
    keep : torch.Tensor or None
        Their indices among all, in the order (step, batch row, token); None for all.
    queries : int
        Those of them that keep their query.
    keep_queries : torch.Tensor or None
        Their indices, likewise.
    slots : numpy.ndarray or None
        [batch, slot] of bool, which of the slots of their cache, those rows' last, hold tokens;
        None where a slot is no place in the keys.
    """

    count: int
    keep: torch.Tensor | None
    queries: int
    keep_queries: torch.Tensor | None
    slots: Bools | None = None

    @classmethod
    def plain(cls, count: int, slots: int) -> RowChoice:
        """All rows of some steps of one sequence, which has filled so many slots after them."""
        return cls(count, None, count, None, np.ones((1, slots), bool))

    @classmethod
    def of(cls, steps: Sequence[ActiveStep]) -> RowChoice:
        """The rows of some steps without a fault."""
        last = steps[-1]
        slots = None if last.is_packed else last.entry.real[:, : last.past + last.length]
        if all(step.keep is None and step.record.queries is None for step in steps):
            count = sum(step.batch * step.length for step in steps)
            return cls(count, None, count, None, slots)
        real = np.concatenate([step.real.ravel() for step in steps])
        kept = np.concatenate([step.kept_queries for step in steps])
        rows = np.flatnonzero(real)
        queries = rows[kept]
        return cls(
            len(rows),
            None if len(rows) == len(real) else torch.from_numpy(rows),
            len(queries),
            None if len(queries) == len(real) else torch.from_numpy(queries),
            slots,
        )


@dataclass
class LayerParts:
    """What one layer was given over consecutive steps of one batch.

    Nothing writes into q, k or v meanwhile: the first is the layer's own, the others are the
    cache's, and whoever changes a cache between steps has what is held copied first. Of a cache
    only the newest tensor is held, since it has the earlier steps' tokens too: holding each
    step's would keep every length of the cache alive.
    """

    spec: LayerSpec
    sinks: torch.Tensor | None
    kinds: frozenset[str]
    parts: dict[str, list[Part]] = field(default_factory=dict)
    sums: list[Sums | None] = field(default_factory=list)
    steps: int = 0
    summed: tuple[Summed, ...] = ()

    def add(self, taken: Taken, length: int) -> None:
        """Add a step's rows."""
        self.steps += 1
        self.sums.append(taken.sums)
        self.summed += taken.summed
        for kind, tensor in (("q", taken.q), ("k", taken.k), ("v", taken.v)):
            if tensor is None:
                continue
            parts = self.parts.setdefault(kind, [])
            first = 0 if kind == "q" else taken.first
            hold = Hold.FRESH if kind == "q" else taken.hold
            last = parts[-1] if parts and hold is Hold.KEPT else None
            if last is not None and first >= last.length:
                last.tensor, last.first = tensor, first - last.length
                last.length += length
            elif hold is Hold.BORROWED:
                parts.append(Part(tensor[:, :, first : first + length].clone(), 0, length))
            else:
                parts.append(Part(tensor, first, length))

    def renew(self, taken: Taken) -> None:
        """Hold what a next step was given in place of older tensors whose tokens it has too.

        Only of a cache that keeps them: `Hold.KEPT`.
        """
        for kind, tensor in (("k", taken.k), ("v", taken.v)):
            parts = self.parts.get(kind)
            if tensor is not None and parts and taken.first >= parts[-1].length:
                last = parts[-1]
                last.tensor, last.first = tensor, taken.first - last.length

    def nbytes(self, rows: RowChoice, dtype: torch.dtype) -> int:
        """Room that the rows take in a slab."""
        spec, size = self.spec, dtype.itemsize
        rooms = {
            "q": self._queries(rows)[0] * spec.num_q_heads * spec.head_dim * size,
            "k": rows.count * spec.num_kv_heads * spec.head_dim * size,
            "v": rows.count * spec.num_kv_heads * spec.value_dim * size,
            "key_norm": rows.count * spec.num_kv_heads * 4,
            "value_norm": rows.count * spec.num_kv_heads * 4,
        }
        sums = sum(room_for(x.nbytes) for some in self.sums if some for x in some.tensors)
        if self._is_summed_here(rows):
            sums += room_for(rows.queries * spec.num_q_heads * 4)
        if self.sinks is not None and self._written:
            sums += room_for(self.sinks.numel() * 4)
        return sums + sum(room_for(rooms[kind]) for kind in self._written)

    @property
    def devices(self) -> set[torch.device]:
        """Where the rows lie, other than the host."""
        newest = (parts[-1].tensor for parts in self.parts.values())
        return {tensor.device for tensor in newest if is_off_host(tensor)}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that `copy` reads."""
        found = [part.tensor for parts in self.parts.values() for part in parts]
        found += [tensor for one in self.sums if one is not None for tensor in one.tensors]
        return found if self.sinks is None else [*found, self.sinks]

    @property
    def _written(self) -> list[str]:
        """Kinds that have rows."""
        kinds = self.kinds | ({"q", "k"} if self.summed else set())
        return [kind for kind, source in SOURCES.items() if kind in kinds and source in self.parts]

    def _queries(self, rows: RowChoice) -> tuple[int, torch.Tensor | None]:
        """How many queries are copied, and which; None for all."""
        if self.summed:
            return rows.count, rows.keep
        return rows.queries, rows.keep_queries

    def copy(self, slab: Slab, rows: RowChoice, dtype: torch.dtype) -> LayerRows:
        """Copy the rows into a slab.

        Parameters
        ----------
        slab : Slab
            Has the room.
        rows : RowChoice
            Rows to write.
        dtype : torch.dtype
            Storage type.
        """
        found: dict[str, Any] = {}
        for kind in self._written:
            ordered = self._ordered(SOURCES[kind])
            if kind == "q":
                found[kind] = _copy(ordered, slab, *self._queries(rows), dtype)
            elif kind in ("k", "v"):
                found[kind] = _copy(ordered, slab, rows.count, rows.keep, dtype)
            else:
                norm = norms(ordered, dtype)
                found[kind] = _copy(norm, slab, rows.count, rows.keep, torch.float32)[:, :, 0]
        sums = sums_to_host(self.sums, slab)
        if self._is_summed_here(rows) and (lse := self._lse(rows, dtype)) is not None:
            sums["lse"] = _copy(lse, slab, rows.queries, rows.keep_queries, torch.float32)[:, :, 0]
        sinks = None if self.sinks is None else self._sinks_to_host(self.sinks, slab)
        if self.summed:
            sums["summed"] = self.summed
            sums["only_summed"] = sorted({"q", "k"} - self._kept(rows))
        return LayerRows(self.spec, **found, sinks=sinks, **sums)

    def _sinks_to_host(self, sinks: torch.Tensor, slab: Slab) -> Any:
        # Of a device by the slab, since reading them here would wait for the model.
        if is_off_host(sinks):
            return into_slab(sinks.detach(), slab)
        return sinks.detach().float().numpy()

    def _kept(self, rows: RowChoice) -> frozenset[str]:
        return self.kinds if rows.queries else self.kinds - {"q"}

    def _is_summed_here(self, rows: RowChoice) -> bool:
        """Whether the rows' log-sum-exps are computed from the keys held."""
        parts = self.parts.get("k", [])
        return (
            rows.slots is not None
            and "q" in self._written
            and len(parts) == 1
            and parts[0].first + parts[0].length == rows.slots.shape[1]
            and self.spec.attention_kind == "full"
            and not any(one is not None and one.lse is not None for one in self.sums)
            and is_off_host(parts[0].tensor)
        )

    def _lse(self, rows: RowChoice, dtype: torch.dtype) -> torch.Tensor | None:
        """[.., .., q_head, 1] of all rows, ordered as `_ordered` orders them."""
        if rows.slots is None:
            return None
        ordered = self._ordered("q")
        q = ordered.permute(1, 2, 0, 3) if self.steps > 1 else ordered.permute(0, 2, 1, 3)
        k = of_heads(self.parts["k"][0].tensor.detach(), self.spec, queries=False)
        lse = held_lse(q, k, rows.slots, self.spec, dtype, self.sinks)
        if lse is None:
            return None
        return (lse.transpose(0, 1) if self.steps > 1 else lse)[..., None]

    def _ordered(self, source: str) -> torch.Tensor:
        """[.., .., kept head, width] of all rows, in the order (step, batch row, token)."""
        views = [part.view.detach() for part in self.parts[source]]
        whole = views[0] if len(views) == 1 else torch.cat(views, dim=2)
        whole = of_heads(whole, self.spec, queries=source == "q")
        # Several steps: one token a batch row each, or one batch row; see `Held.takes`.
        return whole.permute(2, 0, 1, 3) if self.steps > 1 else whole.permute(0, 2, 1, 3)


def _copy(
    ordered: torch.Tensor, slab: Slab, rows: int, keep: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    heads, width = ordered.shape[2:]
    if keep is not None:
        at = keep.to(ordered.device, non_blocking=True)
        ordered = ordered.reshape(-1, heads, width).index_select(0, at)
    return into_slab(ordered, slab, dtype).reshape(rows, heads, width)
