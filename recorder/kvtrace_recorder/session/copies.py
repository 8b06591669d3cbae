"""Rows on their way to the writer's memory: gathered over steps, ordered, narrowed, in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvtrace.writer import LayerSpec
from kvtrace_recorder.messages import LayerRows
from kvtrace_recorder.session.step import Hold, Taken
from kvtrace_recorder.writer.slabs import Slab, room_for

DTYPES = {"float16": torch.float16, "float32": torch.float32}


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
    parts: dict[str, list[Part]] = field(default_factory=dict)
    steps: int = 0

    def add(self, taken: Taken, length: int) -> None:
        """Add a step's rows."""
        self.steps += 1
        for kind, tensor in (("q", taken.q), ("k", taken.k), ("v", taken.v)):
            if tensor is None:
                continue
            parts = self.parts.setdefault(kind, [])
            first = 0 if kind == "q" else taken.first
            hold = Hold.FRESH if kind == "q" else taken.hold
            last = parts[-1] if parts and hold is Hold.KEPT else None
            if last is not None and first >= last.length:
                parts[-1] = Part(tensor, first - last.length, last.length + length)
            elif hold is Hold.BORROWED:
                parts.append(Part(tensor[:, :, first : first + length].clone(), 0, length))
            else:
                parts.append(Part(tensor, first, length))

    def nbytes(self, rows: int, dtype: torch.dtype) -> int:
        """Room that the rows take in a slab."""
        return sum(
            room_for(rows * x.shape[1] * x.shape[3] * dtype.itemsize)
            for x in (parts[0].tensor for parts in self.parts.values())
        )

    def copy(
        self, slab: Slab, rows: int, keep: torch.Tensor | None, dtype: torch.dtype
    ) -> LayerRows:
        """Copy the rows into a slab.

        Parameters
        ----------
        slab : Slab
            Has the room.
        rows : int
            Rows to keep.
        keep : torch.Tensor or None
            Their indices among all, in the order (step, batch row, token); None for all.
        dtype : torch.dtype
            Storage type.
        """
        found: dict[str, Any] = dict.fromkeys(("q", "k", "v"))
        for kind, parts in self.parts.items():
            views = [part.view.detach() for part in parts]
            whole = views[0] if len(views) == 1 else torch.cat(views, dim=2)
            # Several steps: one token a batch row each, or one batch row; see `Held.takes`.
            ordered = whole.permute(2, 0, 1, 3) if self.steps > 1 else whole.permute(0, 2, 1, 3)
            found[kind] = _copy(ordered, slab, rows, keep, dtype)
        sinks = None if self.sinks is None else self.sinks.detach().float().cpu().numpy()
        return LayerRows(self.spec, **found, sinks=sinks)


def _copy(
    ordered: torch.Tensor, slab: Slab, rows: int, keep: torch.Tensor | None, dtype: torch.dtype
) -> Any:
    heads, width = ordered.shape[2:]
    memory = slab.take(rows * heads * width * dtype.itemsize)
    target = torch.from_numpy(memory).view(dtype)
    if keep is None:
        # One pass that orders, narrows and copies.
        target.view(ordered.shape).copy_(ordered)
    else:
        flat = ordered.reshape(-1, heads, width).index_select(0, keep.to(ordered.device))
        target.view(flat.shape).copy_(flat)
    return target.view(rows, heads, width).numpy()
