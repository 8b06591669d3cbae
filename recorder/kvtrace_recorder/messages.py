"""What the taps hand to the writer: plain values and numpy arrays, nothing of the model.

A message may cross to another process (`kvtrace_recorder.writer.codec`), so every type here is a
dataclass of plain values, arrays, and such dataclasses. `MESSAGES` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvtrace.writer import LayerSpec
from kvtrace_recorder.layer_rows import Array, LayerRows, Received, StackedRows, Summed


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
        Columns of table `models`, and `config`, all plain values.
    wo : numpy.ndarray or None
        [layer, hidden, q_head * value_dim], the output projections, where they are kept.
    """

    key: int
    source: str
    columns: Mapping[str, Any]
    wo: Array | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Texts of some tokens, sent before the first step that has them.

    Attributes
    ----------
    source : str
        As in `ModelInfo`.
    ids : list of int
        Tokens.
    texts : list of str or None
        Their texts; None where unknown.
    """

    source: str
    ids: list[int]
    texts: list[str | None]


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
    encoder_request : int or None
        The request that its cross attention reads.
    arrived_ns : int or None
        Wall clock when a scheduler was given the request; known when it begins.
    """

    request: int
    batch_index: int
    position: int
    count: int
    new: bool
    prompt_tokens: int = 0
    external_id: str | None = None
    from_prompt: int | None = None
    encoder_request: int | None = None
    arrived_ns: int | None = None


@dataclass(frozen=True)
class ForkedRequest:
    """From here on `request` is the first `tokens` tokens of `source`, itself after a crop."""

    request: int
    source: int
    tokens: int


class CacheEvent(NamedTuple):
    """A row of `kv_events` before it knows its step; names as in schema.sql.

    A tuple, and a plain list at the writer's: a decode step makes one for every layer.
    """

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


@dataclass(frozen=True)
class LayerGrowth:
    """What a token more takes in one layer of a cache that holds just its tokens."""

    layer: int
    nbytes: int
    device: str


@dataclass
class StepRecord:
    """One forward pass of one model, without its rows.

    Attributes
    ----------
    phase : str
        prefill, decode, mixed or train.
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
    token_ids : list of int or None
        One a row; None where the model was given embeddings.
    events : list of CacheEvent
        What the step did to the cache.
    caveat : str or None
        Why attention recomputed from the step's rows is not exactly the model's.
    queries : numpy.ndarray or None
        [row] of bool, the rows that keep their query; None where all do.
    fault : str or None
        Why the step's rows cannot be recorded; the step itself still is.
    training_step : int or None
        Optimizer steps taken before; None outside training.
    slots : int or None
        Tokens that every layer of `StepBatch.growth` holds after it, where growing to that is all
        that the step did to its cache.
    """

    phase: str
    batch_size: int
    num_tokens: int
    started_ns: int
    duration_ns: int = 0
    forks: Sequence[ForkedRequest] = ()
    sequences: Sequence[Sequenced] = ()
    token_ids: list[int] | None = None
    events: list[CacheEvent] = field(default_factory=list)
    caveat: str | None = None
    queries: Array | None = None
    fault: str | None = None
    training_step: int | None = None
    slots: int | None = None


@dataclass
class StepBatch:
    """Consecutive forward passes of one model and what its layers saw of their rows.

    Attributes
    ----------
    model : int
        Key of the model, whose `ModelInfo` was sent before.
    steps : list of StepRecord
        In order; only the first may have forks.
    layers : list of LayerRows
        Rows of all steps without a fault, in order; empty where there are none.
    growth : sequence of LayerGrowth
        The layers that steps with `slots` grew.
    """

    model: int
    steps: list[StepRecord]
    layers: list[LayerRows] = field(default_factory=list)
    growth: Sequence[LayerGrowth] = ()

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        whole = (step for step in self.steps if step.fault is None)
        return sum(sequence.count for step in whole for sequence in step.sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of their rows."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def known_ids(self) -> set[int]:
        """Token ids of its steps, as far as they are known."""
        return {x for step in self.steps for x in step.token_ids or ()}


@dataclass
class DecodeSteps:
    """Consecutive steps of one request, of one token each, in columns: what most steps are.

    Attributes
    ----------
    model, request, prompt_tokens : int
        As in `StepBatch` and `Sequenced`.
    position : int
        Of the first step's token.
    started_ns, duration_ns, token_ids : list of int
        [step], as in `StepRecord`.
    slots : int
        Tokens that every layer of `growth` holds after the first step.
    growth : sequence of LayerGrowth
        What each step added to its cache; empty where `events` says what it did.
    events : list of list of CacheEvent
        [step], what each did to its cache; empty where that was to grow.
    layers : list of LayerRows
        Rows of all steps.
    stacked : StackedRows or None
        The same of layers that look alike, in place of `layers`.
    """

    model: int
    request: int
    prompt_tokens: int
    position: int
    started_ns: list[int]
    duration_ns: list[int]
    token_ids: list[int]
    slots: int
    growth: Sequence[LayerGrowth] = ()
    events: list[list[CacheEvent]] = field(default_factory=list)
    layers: list[LayerRows] = field(default_factory=list)
    stacked: StackedRows | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the steps."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of their rows."""
        found = sum(layer.nbytes for layer in self.layers)
        return found if self.stacked is None else found + self.stacked.nbytes

    @property
    def known_ids(self) -> set[int]:
        """Token ids of the steps."""
        return set(self.token_ids)

    def batch(self, specs: Mapping[int, LayerSpec]) -> StepBatch:
        """The same, a record a step, given the layers by number."""
        steps = [
            StepRecord(
                "decode",
                batch_size=1,
                num_tokens=1,
                started_ns=started,
                duration_ns=duration,
                sequences=(
                    Sequenced(self.request, 0, self.position + i, 1, False, self.prompt_tokens),
                ),
                token_ids=[token],
                events=self.events[i] if self.events else [],
                slots=self.slots + i if self.growth else None,
            )
            for i, (started, duration, token) in enumerate(
                zip(self.started_ns, self.duration_ns, self.token_ids, strict=True)
            )
        ]
        layers = self.layers if self.stacked is None else self.stacked.layers(specs)
        return StepBatch(self.model, steps, layers, self.growth)


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
class Outputs:
    """What the attention kernel returned for some rows: compared with the trace at the end.

    Attributes
    ----------
    layer, request : int
        Whose rows.
    positions : list of int
        [row], in the request.
    values : numpy.ndarray
        [row, q_head, value_dim] float32, of the kept heads.
    """

    layer: int
    request: int
    positions: list[int]
    values: Array


@dataclass(frozen=True)
class RowlessRequest:
    """A request of which no row can be recorded: events name it.

    Attributes
    ----------
    model : int
        Key of its model.
    request, external_id, prompt_tokens
        As in `Sequenced`.
    started_ns : int
        Wall clock.
    """

    model: int
    request: int
    external_id: str | None
    prompt_tokens: int
    started_ns: int


@dataclass(frozen=True)
class PoolInfo:
    """What a paged cache and its scheduler were set to, for one group of layers.

    Attributes
    ----------
    model : int
        Key of its model.
    columns : dict
        Of table `kv_pools`.
    """

    model: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Dormant:
    """Requests that have ended, while others may still begin with blocks of theirs: their keys."""

    requests: tuple[int, ...]


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


Message = (
    ModelInfo
    | Vocabulary
    | StepBatch
    | DecodeSteps
    | CacheChange
    | Outputs
    | RowlessRequest
    | PoolInfo
    | Dormant
    | Ended
    | Gap
)
#: Every dataclass that a message may be or hold.
MESSAGES: tuple[type, ...] = (
    RowlessRequest,
    PoolInfo,
    Dormant,
    ModelInfo,
    Vocabulary,
    LayerSpec,
    Received,
    Summed,
    LayerRows,
    StackedRows,
    Sequenced,
    ForkedRequest,
    LayerGrowth,
    StepRecord,
    StepBatch,
    DecodeSteps,
    CacheChange,
    Outputs,
    Ended,
    Gap,
)


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
