"""What the taps hand to the writer thread: plain numpy, no torch, no reference to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.writer import LayerSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class ModelInfo:
    """A model as table `models` describes it.

    Attributes
    ----------
    key : int
        The session's own number for the model.
    source : str
        Where its tokenizer may lie: a directory or a hub name, empty when unknown.
    columns : mapping
        Columns of table `models`, and `config`.
    """

    key: int
    source: str
    columns: Mapping[str, Any]


@dataclass
class Sequenced:
    """A request's share of one step: `count` tokens from `position` on.

    Attributes
    ----------
    request : int
        Number of the request.
    batch_index : int
        Row of the batch.
    position : int
        Position of its first token in this step.
    count : int
        Tokens, padding not counted.
    new : bool
        Whether the request begins with this step.
    prompt_tokens : int
        Tokens of its prompt; known when it begins.
    external_id : str or None
        The request's id where it was asked for.
    from_prompt : int or None
        How many of the step's tokens are of the prompt; None: what the phase says.
    """

    request: int
    batch_index: int
    position: int
    count: int
    new: bool
    prompt_tokens: int = 0
    external_id: str | None = None
    from_prompt: int | None = None


@dataclass
class LayerRows:
    """What one attention layer saw of a step's rows, in the trace's storage type.

    Attributes
    ----------
    spec : LayerSpec
        The layer as this call showed it.
    q : numpy.ndarray or None
        [row, q_head, head_dim]; None, like k and v, where the detail leaves it out.
    k : numpy.ndarray or None
        [row, kv_head, head_dim]
    v : numpy.ndarray or None
        [row, kv_head, value_dim]
    sinks : numpy.ndarray or None
        [q_head] float32, the logit that each head's softmax has in addition to its keys.
    """

    spec: LayerSpec
    q: Array | None
    k: Array | None
    v: Array | None
    sinks: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.sinks) if x is not None)


@dataclass(frozen=True)
class ForkedRequest:
    """From here on `request` is the first `tokens` tokens of `source`, itself after a crop."""

    request: int
    source: int
    tokens: int


@dataclass
class CacheEvent:
    """A row of `kv_events` before it knows its step; names as in schema.sql."""

    ts_ns: int
    layer: int | None
    event: str
    tokens: int
    nbytes: int
    device: str
    request: int | None = None
    block: int | None = None
    cache_group: int | None = None
    block_index: int | None = None


@dataclass
class StepRecord:
    """One forward pass of one model.

    Attributes
    ----------
    model : ModelInfo
        The model that ran.
    phase : str
        prefill, decode, or mixed.
    batch_size : int
        Rows of the batch.
    num_tokens : int
        Tokens processed, padding not counted.
    started_ns, duration_ns : int
        Wall clock, and the time of the forward pass without the taps' own.
    forks : sequence of ForkedRequest
        What became of requests since the cache's last step, all at once.
    sequences : sequence of Sequenced
        The requests, in the order of the rows.
    token_ids : numpy.ndarray or None
        [row] int64; None where the model was given embeddings.
    layers : dict of int to LayerRows
        By layer number; empty where only the events are kept.
    events : list of CacheEvent
        What the step did to the cache.
    caveat : str or None
        Why attention recomputed from the step's rows is not exactly the model's.
    fault : str or None
        Why the step's rows cannot be recorded; the step itself still is.
    """

    model: ModelInfo
    phase: str
    batch_size: int
    num_tokens: int
    started_ns: int
    duration_ns: int = 0
    forks: Sequence[ForkedRequest] = ()
    sequences: Sequence[Sequenced] = ()
    token_ids: Array | None = None
    layers: dict[int, LayerRows] = field(default_factory=dict)
    events: list[CacheEvent] = field(default_factory=list)
    caveat: str | None = None
    fault: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the step holds while it waits for the writer."""
        return 1024 + sum(layer.nbytes for layer in self.layers.values())

    def without_rows(self, fault: str) -> StepRecord:
        """The same step with its rows given up."""
        return StepRecord(
            model=self.model,
            phase=self.phase,
            batch_size=self.batch_size,
            num_tokens=self.num_tokens,
            started_ns=self.started_ns,
            duration_ns=self.duration_ns,
            events=self.events,
            fault=fault,
        )


@dataclass(frozen=True)
class CacheChange:
    """What happened to a cache between two steps.

    Attributes
    ----------
    events : tuple of CacheEvent
        What each layer holds after it, or each block.
    forks : tuple of ForkedRequest
        Requests that became shorter and will not go on.
    """

    events: tuple[CacheEvent, ...] = ()
    forks: tuple[ForkedRequest, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Requests that will not go on: their cache is gone, or they never had one.

    Attributes
    ----------
    requests : tuple of int
        Their numbers.
    freed_ns : int or None
        When their cache went; None where they had none.
    """

    requests: tuple[int, ...]
    freed_ns: int | None


@dataclass(frozen=True)
class Gap:
    """Something that the trace does not hold."""

    what: str
    count: int
    reason: str


Message = StepRecord | CacheChange | Ended | Gap


def finite_float16(values: Array) -> tuple[Array, int]:
    """Bring float16 values that overflowed back to the largest float16.

    Parameters
    ----------
    values : numpy.ndarray
        Of any type; only float16 can have overflowed when the tap narrowed it.

    Returns
    -------
    numpy.ndarray
        The same array where nothing overflowed, else a copy.
    int
        Values that were out of range.
    """
    if values.dtype != np.float16:
        return values, 0
    # Infinity by its bits: numpy has no vector code for float16.
    infinite = (values.view(np.uint16) & 0x7FFF) == 0x7C00
    count = int(np.count_nonzero(infinite))
    if not count:
        return values, 0
    largest = np.finfo(np.float16).max
    clipped: Array = np.where(infinite, np.copysign(largest, values), values).astype(np.float16)
    return clipped, count
