"""A forward pass while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec
from kvtrace_recorder.layer_rows import LayerRows, Summed
from kvtrace_recorder.messages import StepRecord
from kvtrace_recorder.session.keeping import Plan
from kvtrace_recorder.session.models import ModelState
from kvtrace_recorder.session.requests import Bools, CacheEntry
from kvtrace_recorder.writer.slabs import Slab

if TYPE_CHECKING:
    from kvtrace_recorder.session.decode import DecodeRun, RunLayer
    from kvtrace_recorder.taps.keep import Sums

#: Steps of more rows than this are large.
LARGE_ROWS = 64


class Hold(Enum):
    """What becomes of keys and values that an attention call was given."""

    FRESH = "made for this call, and never written into"
    KEPT = "the cache's, with what earlier calls showed, unchanged until the cache is changed"
    BORROWED = "the cache's, which may write into them at the next step"


@dataclass(slots=True)
class Taken:
    """What a layer's attention call was given of the step's own tokens, still where it was.

    Attributes
    ----------
    spec : LayerSpec
        The layer.
    q, k, v : torch.Tensor or None
        [batch, head, token, width], as far as they are kept; k and v may hold more than the
        step's tokens.
    first : int
        Where in k and v the step's tokens begin.
    hold : Hold
        What becomes of k and v after the step.
    sinks : torch.Tensor or None
        [q_head] of the kept heads.
    kinds : frozenset of str
        What is written of the rows: of q, k, v, key_norm, value_norm.
    sums : Sums or None
        What was computed of the rows.
    summed : tuple of Summed
        What the writer is to compute of them: then q and k are given, kept or not.
    """

    spec: LayerSpec
    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    first: int
    hold: Hold
    sinks: torch.Tensor | None
    kinds: frozenset[str]
    sums: Sums | None = None
    summed: tuple[Summed, ...] = ()

    def own(self, length: int) -> None:
        """Copy the step's tokens on their device; nothing else is held of the call any more."""
        if self.q is not None:
            self.q = self.q.clone()
        mine = slice(self.first, self.first + length)
        if self.k is not None:
            self.k = self.k[:, :, mine].clone()
        if self.v is not None:
            self.v = self.v[:, :, mine].clone()
        self.first, self.hold = 0, Hold.FRESH


@dataclass
class ActiveStep:
    """What the taps share between the begin and the end of a step.

    Attributes
    ----------
    model : ModelState
        The model that runs.
    record : StepRecord
        What will be written; layers are added as they run.
    batch, length : int
        Shape of the step's tokens, padding included.
    past : int
        Slots filled in the cache before the step.
    cache : transformers Cache or None
        As the model was given it.
    entry : CacheEntry
        The requests.
    real : numpy.ndarray
        [batch, length] of bool: tokens rather than padding.
    keep : torch.Tensor or None
        Indices of the tokens in [batch * length]; None where there is no padding.
    taken : dict of int to Taken
        Layers that have attended; None once their rows are copied.
    layers : list of LayerRows
        Rows that are copied already: those of large steps.
    slabs : list of Slab
        Where they stand.
    keeps : Plan or None
        What the step keeps; decided at its first attention call.
    kept_bytes : int
        What that takes in the trace.
    summed : tuple of Summed or None
        As in `Taken`, of every layer; None before it is known.
    tap_ns : int
        Time spent in taps, which is not the model's.
    checked : set
        Masks already compared in this step.
    is_packed : bool
        Whether one batch row holds several sequences (continuous batching).
    spans : list of (bool, int, int)
        Of each of those: whether it is recorded, its tokens in the cache before the step, and its
        tokens in the step.
    seen_keys : torch.Tensor or None
        [1, kv_head, key, head_dim]: the keys of all of them, as the layer that ran last saw them.
    attended : Counter
        Calls of each attention module, by id, that were found without an interface.
    masks : dict
        What masks show, by id.
    projected : sequence of torch.Tensor or None
        q, k and v of the last `nn.MultiheadAttention`, [token, batch, heads * head_dim].
    ids : numpy.ndarray or None
        Token ids of a step whose shape is not known yet.
    run : DecodeRun or None
        The plain steps that it is one of.
    calls : list of RunLayer or None
        Its attention calls through the interface, as the next step's may be; None where not.
    is_sampled : bool or None
        Whether outputs of its attention are put aside; None before its first call.
    half : str or None
        encoder or decoder, where the model has both.
    cross_cache : transformers Cache or None
        Where a decoder keeps what it has read of its encoder.
    """

    model: ModelState
    record: StepRecord
    batch: int
    length: int
    past: int
    cache: Any
    entry: CacheEntry
    real: Bools
    keep: torch.Tensor | None
    taken: dict[int, Taken | None] = field(default_factory=dict)
    layers: list[LayerRows] = field(default_factory=list)
    slabs: list[Slab] = field(default_factory=list)
    keeps: Plan | None = None
    kept_bytes: int = 0
    summed: tuple[Summed, ...] | None = None
    tap_ns: int = 0
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    is_packed: bool = False
    spans: list[tuple[bool, int, int]] = field(default_factory=list)
    seen_keys: torch.Tensor | None = None
    attended: Counter[int] = field(default_factory=Counter)
    masks: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    projected: Sequence[torch.Tensor] | None = None
    ids: NDArray[np.int64] | None = None
    run: DecodeRun | None = None
    calls: list[RunLayer | None] = field(default_factory=list)
    is_sampled: bool | None = None
    half: str | None = None
    cross_cache: Any = None

    @property
    def kept_queries(self) -> Bools:
        """[row] of bool: which of the tokens keep their query."""
        kept = self.record.queries
        return np.ones(int(self.real.sum()), bool) if kept is None else kept

    @property
    def is_large(self) -> bool:
        """Whether rows are copied layer by layer, so that they do not pile up."""
        return self.batch * self.length > LARGE_ROWS

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether no padding stands between the tokens of any row, this step's included."""
        return self.entry.is_contiguous
