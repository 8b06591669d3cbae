"""What is kept of an attention call: layers, heads, queries, and what is computed on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtrace.model import number_text
from kvtrace.writer import LayerSpec
from kvtrace_recorder.layer_rows import Received, Summed
from kvtrace_recorder.messages import Sequenced
from kvtrace_recorder.selection import Queries
from kvtrace_recorder.session.keeping import Keeper, Plan
from kvtrace_recorder.session.step import ActiveStep
from kvtrace_recorder.taps.call import Call
from kvtrace_recorder.taps.guard import UnrecordableError
from kvtrace_recorder.taps.received import as_stored, row_sums
from kvtrace_recorder.writer.slabs import Slab

DTYPES = {"float16": torch.float16, "float32": torch.float32}
_NUMPY: dict[torch.dtype, Any] = {torch.float16: np.float16, torch.float32: np.float32}
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sums:
    """What was computed of a layer's rows where they were.

    Attributes
    ----------
    lse : torch.Tensor or None
        [query, q_head] of the rows that keep their query; None where the writer computes it.
    received : list of (request, first position, [key, q_head])
        As `Received`, still on the device.
    """

    lse: torch.Tensor | None
    received: list[tuple[int, int, torch.Tensor]]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of it."""
        found = [values for _, _, values in self.received]
        return found if self.lse is None else [*found, self.lse]


def sums_to_host(sums: Sequence[Sums | None], slab: Slab) -> dict[str, Any]:
    """Fields `lse` and `received` of `LayerRows` over some steps, copied into a slab."""
    found = [one for one in sums if one is not None]
    received = [
        Received(request, first, into_slab(values, slab))
        for one in found
        for request, first, values in one.received
    ]
    lses = [one.lse for one in found if one.lse is not None]
    # Of all steps or of none: the writer needs the keys of every step to go on with it.
    whole = len(lses) == len(sums) and bool(lses)
    return {"lse": into_slab(torch.cat(lses), slab) if whole else None, "received": received}


def into_slab(values: torch.Tensor, slab: Slab, dtype: torch.dtype = torch.float32) -> NDArray[Any]:
    """Copy a tensor into a slab, as numbers of one of `DTYPES`: in order, narrowed, in one pass.

    From a device they may still be on their way: see `Slab.settle`.
    """
    memory = slab.take(values.numel() * dtype.itemsize)
    target = torch.from_numpy(memory).view(dtype).view(values.shape)
    if slab.arrival is None:
        target.copy_(values)
    else:
        slab.arrival.add(target, values)
    return as_array(memory, dtype, tuple(values.shape))


def as_array(memory: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    """A slab's bytes as numbers of one of `DTYPES`.

    Not `tensor.numpy()`: the array outlives the step, and the tensor that it would hold lies in
    the C heap between the model's own, where it keeps the space around it from being used again.
    """
    found: NDArray[Any] = memory.view(_NUMPY[dtype]).reshape(shape)
    return found


def is_off_host(values: torch.Tensor) -> bool:
    """Whether a tensor lies where log-sum-exps are faster to compute than the writer could."""
    return values.device.type != "cpu"


def choose_heads(spec: LayerSpec, heads: tuple[int, ...] | None) -> LayerSpec:
    """A layer with only the KV heads that were asked for.

    Raises
    ------
    UnrecordableError
        Where it has none of them.
    """
    if heads is None:
        return spec
    if spec.model_kv_heads is not None:
        raise UnrecordableError(
            f"KV heads {number_text(heads)} were asked for; the heads of layer {spec.layer} are"
            " split over processes, of which each keeps all or none: leave --heads out"
        )
    kept = tuple(head for head in heads if head < spec.num_kv_heads)
    if not kept:
        raise UnrecordableError(
            f"KV heads {number_text(heads)} were asked for; layer {spec.layer} has"
            f" {number_text(range(spec.num_kv_heads))}"
        )
    group = spec.num_q_heads // spec.num_kv_heads
    slopes, bias, numbers = spec.alibi_slopes, spec.position_bias, q_heads(kept, group)
    return replace(
        spec,
        num_q_heads=len(kept) * group,
        num_kv_heads=len(kept),
        kv_heads=kept,
        alibi_slopes=None if slopes is None else tuple(slopes[h] for h in numbers),
        position_bias=None if bias is None else tuple(bias[h] for h in numbers),
    )


def q_heads(kv_heads: tuple[int, ...], group: int) -> list[int]:
    """The query heads that read some KV heads."""
    return [head * group + one for head in kv_heads for one in range(group)]


def of_heads(values: torch.Tensor, spec: LayerSpec, *, queries: bool) -> torch.Tensor:
    """[batch, kept head, token, width] of a tensor with the heads of a call; a view if all."""
    # Of a layer whose heads are split over processes all that are here may be kept.
    kept = spec.num_q_heads if queries else spec.num_kv_heads
    if spec.kv_heads is None or values.shape[1] == kept:
        return values
    group = spec.num_q_heads // spec.num_kv_heads
    heads = q_heads(spec.kv_heads, group if queries else 1)
    return values.index_select(1, torch.tensor(heads).to(values.device, non_blocking=True))


def plan_step(step: ActiveStep, keeper: Keeper, spec: LayerSpec) -> Plan:
    """What the running step keeps; decided at its first attention call.

    Raises
    ------
    UnrecordableError
        Where the trace is full.
    """
    if step.keeps is None:
        sequences = step.record.sequences
        layers = planned_layers(step, keeper)
        specs = {layer: step.model.specs.get(layer, spec) for layer in layers}
        rows = sum(sequence.count for sequence in sequences)
        step.keeps, step.kept_bytes = keeper.plan(
            specs, rows, lambda some: int(_queries(some, sequences).sum())
        )
        kept = _queries(step.keeps.queries, sequences)
        if "q" not in step.keeps.kinds:
            kept[:] = False
        step.record.queries = None if kept.all() else kept
    return step.keeps


def kinds_of(step: ActiveStep, keeper: Keeper, spec: LayerSpec) -> frozenset[str]:
    """What the running step writes of a layer; raises as `plan_step` does."""
    found = plan_step(step, keeper, spec).kinds_of(spec.layer, planned_layers(step, keeper))
    has_none = step.record.queries is not None and not step.record.queries.any()
    return found - {"q"} if has_none else found


def planned_layers(step: ActiveStep, keeper: Keeper) -> list[int]:
    """The model's layers that were asked for; before its first step is whole, those it says."""
    expected = step.model.expected.get(step.half)
    if expected is not None:
        return sorted(expected)
    count = step.model.info.columns.get("num_layers") or 1
    return [layer for layer in sorted({*range(count), *step.model.specs}) if keeper.asks(layer)]


def _queries(asked: Queries, sequences: Sequence[Sequenced]) -> Bools:
    """[row]: which rows of a step keep their query."""
    parts = [asked.of(s.position, s.count, s.prompt_tokens) for s in sequences]
    return np.concatenate(parts) if parts else np.ones(0, bool)


def norms(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Lengths of keys or values [..., width] as the trace would store them: [..., 1] float32."""
    found: torch.Tensor = torch.linalg.vector_norm(
        as_stored(values, dtype), dim=-1, keepdim=True, dtype=torch.float32
    )
    return found


def summed_prompts(step: ActiveStep, keeper: Keeper, call: Call) -> tuple[Summed, ...]:
    """Of which requests the writer is to sum what their prompts' keys receive: on a CPU, of all.

    There a sum where the model runs would cost it one more attention.
    """
    if step.summed is None:
        plan = step.keeps
        wanted = plan is not None and plan.sums and not is_off_host(call.q)
        step.summed = tuple(
            Summed(
                s.request,
                min(s.count, s.prompt_tokens - s.position),
                s.position + s.count >= s.prompt_tokens,
            )
            for s in step.record.sequences
            if wanted and 0 <= s.position < s.prompt_tokens and keeper.sums(s.request, s.position)
        )
    return step.summed


def sum_rows(
    step: ActiveStep,
    keeper: Keeper,
    spec: LayerSpec,
    call: Call,
    offset: int,
    sinks: torch.Tensor | None,
) -> Sums | None:
    """Compute what the writer cannot: received attention, and log-sum-exps off the CPU.

    Parameters
    ----------
    offset : int
        Slot of the first key that the call was given.
    sinks : torch.Tensor or None
        [q_head] of the kept heads.

    Returns
    -------
    Sums or None
        None where there is nothing to compute.
    """
    plan = step.keeps
    if plan is None or not is_off_host(call.q):
        return None
    # Of a paged cache the kernel gets only the step's own keys: the writer has the others.
    on_host = step.is_packed or "q" not in plan.kinds
    on_host = on_host or not step.is_large
    prompts = any(s.position < s.prompt_tokens for s in step.record.sequences)
    if on_host and not (plan.sums and prompts):
        return None
    given = step.seen_keys if step.is_packed else call.k
    if given is None:
        return None
    q, k = of_heads(call.q, spec, queries=True), of_heads(given, spec, queries=False)
    found: list[tuple[int, int, torch.Tensor]] = []
    lses: list[torch.Tensor] = []
    for sequence, rows, keys, key_first in _sequences(step, spec, offset):
        summed = plan.sums and sequence.position < sequence.prompt_tokens
        summed = summed and keeper.sums(sequence.request, sequence.position)
        if on_host and not summed:
            continue
        queries, seen = _rows_of(q, sequence, step, rows), _rows_of(k, sequence, step, keys)
        prompt = min(sequence.count, sequence.prompt_tokens - sequence.position) if summed else 0
        for start, stop in ((0, prompt), (prompt, sequence.count)):
            if start == stop or (start == prompt and on_host):
                continue
            one = row_sums(
                queries[:, start:stop],
                seen,
                sequence.position + start,
                key_first,
                spec,
                dtype=DTYPES[keeper.dtype],
                sinks=sinks,
                received=stop == prompt,
            )
            lses.append(one.lse)
            if one.received is not None:
                last = sequence.position + prompt - key_first
                found.append((sequence.request, key_first, one.received[:last]))
    return Sums(None if on_host else _kept_lse(step, lses), found)


def _kept_lse(step: ActiveStep, lses: list[torch.Tensor]) -> torch.Tensor | None:
    whole = torch.cat(lses) if lses else None
    rows = sum(sequence.count for sequence in step.record.sequences)
    if whole is None or len(whole) != rows:
        return None
    kept = step.record.queries
    return whole if kept is None else whole[torch.from_numpy(kept).to(whole.device)]


Slots = slice | NDArray[np.int64]


def _sequences(
    step: ActiveStep, spec: LayerSpec, offset: int
) -> Iterator[tuple[Sequenced, Slots, Slots, int]]:
    """Of each request: where its rows and the keys it sees stand, and its first key's position."""
    if step.is_packed:
        yield from _packed(step, spec.sliding_window)
        return
    for sequence in step.record.sequences:
        batch_row = sequence.batch_index
        real = step.entry.real[batch_row, : step.past + step.length]
        key_first = int(real[:offset].sum())
        keys = np.flatnonzero(real[offset:])
        yield sequence, _as_slice(np.flatnonzero(step.real[batch_row])), _as_slice(keys), key_first


def _packed(step: ActiveStep, window: int | None) -> Iterator[tuple[Sequenced, Slots, Slots, int]]:
    """The same where all requests stand in one row, one after the other."""
    sequences = iter(step.record.sequences)
    row = key = 0
    for is_recorded, past, count in step.spans:
        seen = count + (past if window is None else min(past, window - 1))
        if is_recorded:
            rows, keys = slice(row, row + count), slice(key, key + seen)
            yield next(sequences), rows, keys, past + count - seen
        row, key = row + count, key + seen


def _as_slice(slots: NDArray[np.int64]) -> Slots:
    """Slots that stand together as a slice, which costs no copy."""
    if len(slots) and slots[-1] - slots[0] + 1 == len(slots):
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return slots


def _rows_of(
    values: torch.Tensor, sequence: Sequenced, step: ActiveStep, slots: Slots
) -> torch.Tensor:
    """[head, token, width] of one request."""
    one = values[0 if step.is_packed else sequence.batch_index].detach()
    if isinstance(slots, slice):
        return one[:, slots]
    return one.index_select(1, torch.from_numpy(slots).to(one.device, non_blocking=True))
