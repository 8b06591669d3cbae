"""Rows of attention layers as they go to the writer: parts of `kvtrace_recorder.messages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from kvtrace.writer import LayerSpec

Array = NDArray[Any]


@dataclass
class Received:
    """Attention that some keys of a request received from queries of its prompt, in one layer.

    Attributes
    ----------
    request : int
        Number of the request.
    first : int
        Position of the first key.
    values : numpy.ndarray
        [key, q_head] float32, after the softmax, summed over a step's queries.
    """

    request: int
    first: int
    values: Array


@dataclass(frozen=True)
class Summed:
    """A request of which what its prompt's keys receive is summed, over the rows of a step.

    Attributes
    ----------
    request : int
        Number of the request.
    rows : int
        Rows of the prompt in the step.
    ends : bool
        Whether the prompt ends with them.
    """

    request: int
    rows: int
    ends: bool


@dataclass
class LayerRows:
    """What one attention layer saw of a batch's rows, in the trace's storage type.

    Attributes
    ----------
    spec : LayerSpec
        The layer as the calls showed it.
    q : numpy.ndarray or None
        [query, q_head, head_dim], of the rows that keep their query; None, like the others, where
        it is not kept.
    k : numpy.ndarray or None
        [row, kv_head, head_dim]
    v : numpy.ndarray or None
        [row, kv_head, value_dim]
    sinks : numpy.ndarray or None
        [q_head] float32, the logit that each head's softmax has in addition to its keys.
    lse : numpy.ndarray or None
        [query, q_head] float32; None where the writer is to compute it.
    key_norm, value_norm : numpy.ndarray or None
        [row, kv_head] float32.
    received : list of Received
        Where not every query is kept, and it was summed where the model runs.
    summed : list of Summed
        Requests of which the writer is to sum what their prompts' keys received. Then q and k are
        of all rows.
    only_summed : list of str
        Of q and k what is not kept further.
    """

    spec: LayerSpec
    q: Array | None = None
    k: Array | None = None
    v: Array | None = None
    sinks: Array | None = None
    lse: Array | None = None
    key_norm: Array | None = None
    value_norm: Array | None = None
    received: list[Received] = field(default_factory=list)
    summed: Sequence[Summed] = ()
    only_summed: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        arrays = (self.q, self.k, self.v, self.sinks, self.lse, self.key_norm, self.value_norm)
        found = sum(x.nbytes for x in arrays if x is not None)
        return found + sum(part.values.nbytes for part in self.received)


@dataclass
class StackedRows:
    """What layers that look alike saw of a batch's rows; the writer knows them from other steps.

    Attributes
    ----------
    numbers : list of int
        The layers.
    q, k, v : numpy.ndarray or None
        [layer, row, head, width], otherwise as in `LayerRows`.
    """

    numbers: list[int]
    q: Array | None = None
    k: Array | None = None
    v: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.q, self.k, self.v) if x is not None)

    def layers(self, specs: Mapping[int, LayerSpec]) -> list[LayerRows]:
        """The rows of each layer, given the layers by number."""
        given = {name: x for name in "qkv" if (x := getattr(self, name)) is not None}
        return [
            LayerRows(specs[number], **{name: x[at] for name, x in given.items()})
            for at, number in enumerate(self.numbers)
        ]
