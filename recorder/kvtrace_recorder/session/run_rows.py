"""Rows of a run of decode steps on their way to the writer's memory.

Layers that look alike are copied together: a call of torch for one layer's few rows costs far more
than the copy that it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtrace_recorder.layer_rows import LayerRows, StackedRows
from kvtrace_recorder.messages import DecodeSteps
from kvtrace_recorder.session.copies import LayerParts, Part, RowChoice
from kvtrace_recorder.session.step import Taken
from kvtrace_recorder.taps.keep import into_slab, is_off_host
from kvtrace_recorder.writer.slabs import Slab, room_for


@dataclass(slots=True)
class LayerRun:
    """What one layer was given in some steps of a run.

    Attributes
    ----------
    taken : Taken
        What was taken of it before the run: the layer, and what is kept.
    queries : list of torch.Tensor
        [step] of [1, q_head, 1, head_dim]; empty where queries are not kept.
    keys, values : torch.Tensor or None
        [1, kv_head, slot, width], of every slot up to the last step's; None where not kept.
    """

    taken: Taken
    queries: list[torch.Tensor]
    keys: torch.Tensor | None
    values: torch.Tensor | None

    @property
    def form(self) -> tuple[Any, ...]:
        """What layers have in common that are copied together."""
        spec, given = self.taken.spec, (self.keys, self.values, *self.queries[:1])
        widths = (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim)
        return widths, self.taken.kinds, [None if x is None else (x.dtype, x.device) for x in given]

    @property
    def is_simple(self) -> bool:
        """Whether rows are written as they are, of all heads, and nothing is computed of them."""
        tensor = self.keys if self.keys is not None else self.values
        taken = self.taken
        whole = taken.spec.kv_heads is None and taken.kinds <= {"q", "k", "v"}
        return whole and taken.sinks is None and tensor is not None and not is_off_host(tensor)


class RunRows:
    """Rows of all layers over some steps of a run.

    Parameters
    ----------
    layers : sequence of LayerRun
        The layers.
    first, steps : int
        Slot in the cache of the first step's token, and how many steps there are.
    dtype : torch.dtype
        Storage type.
    """

    def __init__(
        self, layers: Sequence[LayerRun], first: int, steps: int, dtype: torch.dtype
    ) -> None:
        self._layers, self._first, self._steps, self._dtype = layers, first, steps, dtype
        self._alike = bool(layers) and all(
            layer.is_simple and layer.form == layers[0].form for layer in layers
        )
        self._choice = RowChoice.plain(steps, first + steps)
        #: Of a device always, which computes log-sum-exps of each layer.
        self._parts = [] if self._alike else [self._parts_of(layer) for layer in layers]

    @property
    def empty(self) -> list[LayerRows]:
        """The layers, of which nothing is kept."""
        return [LayerRows(layer.taken.spec) for layer in self._layers]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that `copy` reads of a device."""
        return [tensor for parts in self._parts for tensor in parts.tensors]

    @property
    def nbytes(self) -> int:
        """Room that the rows take in a slab."""
        if not self._alike:
            return sum(parts.nbytes(self._choice, self._dtype) for parts in self._parts)
        spec, kinds = self._layers[0].taken.spec, self._layers[0].taken.kinds
        widths = {
            "q": spec.num_q_heads * spec.head_dim,
            "k": spec.num_kv_heads * spec.head_dim,
            "v": spec.num_kv_heads * spec.value_dim,
        }
        rows = len(self._layers) * self._steps * self._dtype.itemsize
        return sum(room_for(rows * widths[kind]) for kind in kinds)

    @torch.no_grad()
    def copy(self, slab: Slab, message: DecodeSteps) -> None:
        """Copy the rows into a slab that has the room, and put them into the steps' message."""
        if not self._alike:
            message.layers = [parts.copy(slab, self._choice, self._dtype) for parts in self._parts]
            return
        found: dict[str, Any] = {}
        for kind in sorted(self._layers[0].taken.kinds):
            whole = self._gathered(kind)
            found[kind] = into_slab(whole, slab, self._dtype)
        numbers = [layer.taken.spec.layer for layer in self._layers]
        message.stacked = StackedRows(numbers, **found)

    def _gathered(self, kind: str) -> torch.Tensor:
        """[layer, step, head, width] of q, k or v."""
        if kind == "q":
            whole = torch.cat([one for layer in self._layers for one in layer.queries])
            return whole.view(len(self._layers), self._steps, *whole.shape[1:2], whole.shape[3])
        tensors = [layer.keys if kind == "k" else layer.values for layer in self._layers]
        mine = [x.narrow(2, self._first, self._steps) for x in tensors if x is not None]
        return torch.cat(mine).transpose(1, 2)

    def _parts_of(self, layer: LayerRun) -> LayerParts:
        found = LayerParts(
            layer.taken.spec, layer.taken.sinks, layer.taken.kinds, steps=self._steps
        )
        if layer.queries:
            found.parts["q"] = [Part(query, 0, 1) for query in layer.queries]
        for kind, tensor in (("k", layer.keys), ("v", layer.values)):
            if tensor is not None:
                found.parts[kind] = [Part(tensor, self._first, self._steps)]
        return found
