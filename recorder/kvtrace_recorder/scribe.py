"""Turns messages into a trace's tables and arrays; runs where the writer runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.sequences import Fork
from kvtrace.writer import NARROWED, LayerSpec, TraceWriter
from kvtrace_recorder.histories import Histories
from kvtrace_recorder.layer_rows import LayerRows, Received
from kvtrace_recorder.lse import KeyHistory, row_lse
from kvtrace_recorder.messages import (
    CacheChange,
    CacheEvent,
    DecodeSteps,
    Dormant,
    Ended,
    ForkedRequest,
    Gap,
    LayerGrowth,
    Message,
    ModelInfo,
    Outputs,
    PoolInfo,
    RowlessRequest,
    Sequenced,
    StepBatch,
    StepRecord,
    Vocabulary,
    finite_float16,
)
from kvtrace_recorder.queries import Index, Queries

_EVENT_COLUMNS = (
    "ts_ns",
    "step",
    "request",
    "layer",
    "block",
    "event",
    "tokens",
    "bytes",
    "device",
    "cache_group",
    "block_index",
)
KEYS_GONE = "keys before these rows are not known any more: their source had ended"


class Scribe:
    """Writes steps into a trace.

    Parameters
    ----------
    writer : TraceWriter
        The trace.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        #: By key: the model's number in the trace, and where its tokens' texts come from.
        self._models: dict[int, tuple[int, str]] = {}
        self._texts: dict[str, dict[int, str | None]] = {}
        #: By the model's key and their number.
        self._layers: dict[int, dict[int, LayerSpec]] = defaultdict(dict)
        self._encoders: dict[int, int] = {}
        self._histories = Histories(self._keys_of)
        self._models_of: dict[int, int] = {}
        self._buffers: dict[str, dict[str, list[Any]]] = {}
        self._gaps: dict[tuple[str, str], tuple[int | None, int]] = {}
        self._samples: list[Outputs] = []
        self.reasons: dict[str, int] = {}
        self.steps = 0
        self.requests = 0
        self.nbytes = 0

    def write(self, message: Message) -> None:
        """Write one message."""
        if isinstance(message, StepBatch):
            self._write_batch(message)
        elif isinstance(message, DecodeSteps):
            self._write_batch(message.batch(self._layers[message.model]))
        elif isinstance(message, ModelInfo):
            number = self._writer.add_model(**message.columns)
            self._models[message.key] = (number, message.source)
            if message.wo is not None and len(self._models) == 1:
                self._writer.put_static("wo", message.wo, "layer,hidden,q_head_dim")
        elif isinstance(message, Vocabulary):
            known = self._texts.setdefault(message.source, {})
            known.update(zip(message.ids, message.texts, strict=True))
        elif isinstance(message, CacheChange):
            self._buffer("kv_events", _event_rows(None, message.events))
            self._fork(message.forks)
        elif isinstance(message, Outputs):
            self._samples.append(message)
        elif isinstance(message, RowlessRequest):
            model, _ = self._models[message.model]
            self._buffer("requests", _rowless(model, message))
        elif isinstance(message, PoolInfo):
            model, _ = self._models[message.model]
            columns = {"run": 0, "model": model, **message.columns}
            self._buffer("kv_pools", {name: [value] for name, value in columns.items()})
        elif isinstance(message, Dormant):
            for request in message.requests:
                self._histories.rest(request)
        elif isinstance(message, Ended):
            self._end(message)
        elif isinstance(message, Gap):
            self._note(message.what, message.count, message.reason, None)

    def finish(self) -> None:
        """Hand everything over, and compare the sampled outputs with what was written."""
        self.flush()
        if not self._samples or not self._writer.commit():
            return
        # What is read again is the trace as any reader will find it.
        from kvtrace_recorder.verify import UNCOMPARED, compare

        found = compare(self._writer.path, self._writer.rank, self._samples)
        self._writer.append("verifications", found)
        if not found["rows"]:
            self._writer.add_gap("verifications", len(self._samples), UNCOMPARED)

    def commit(self) -> None:
        """Make everything written so far visible to readers."""
        self.flush()
        self._writer.commit()

    def flush(self) -> None:
        """Hand everything that waits to the writer."""
        for table, columns in self._buffers.items():
            self._writer.append(table, columns)
        self._buffers = {}
        for (what, reason), (step, count) in self._gaps.items():
            self._writer.add_gap(what, count, reason, step)
        self._gaps = {}

    def _write_batch(self, batch: StepBatch) -> None:
        model, _ = self._models[batch.model]
        self._fork(batch.steps[0].forks)
        whole: list[tuple[int, StepRecord]] = []
        for number, step in enumerate(batch.steps, start=self.steps):
            self._buffer("kv_events", _event_rows(number, step.events))
            if step.slots is not None:
                self._buffer("kv_events", _event_rows(number, _grown(step, batch.growth)))
            if step.fault is not None:
                self._note("tokens", step.num_tokens, step.fault, number)
            elif step.sequences:
                whole.append((number, step))
                if step.caveat is not None:
                    self._note("exact attention of rows", step.num_tokens, step.caveat, number)
        self._writer.append("steps", _step_rows(self.steps, model, batch.steps))
        self.steps += len(batch.steps)
        if whole:
            self._write_rows(batch, whole)

    def _write_rows(self, batch: StepBatch, steps: Sequence[tuple[int, StepRecord]]) -> None:
        model, source = self._models[batch.model]
        known = self._layers[batch.model]
        new = [layer.spec for layer in batch.layers if layer.spec.layer not in known]
        if new:
            self._writer.add_layers(model, sorted(new, key=lambda spec: spec.layer))
            known.update((spec.layer, spec) for spec in new)
        numbers, requests, positions = _row_columns(steps)
        self._buffer("requests", _request_rows(model, steps))
        self._encoders |= {
            s.request: s.encoder_request
            for _, step in steps
            for s in step.sequences
            if s.encoder_request is not None
        }
        self.requests += sum(sequence.new for _, step in steps for sequence in step.sequences)
        count = len(requests)
        row = np.arange(self._writer.rows, self._writer.rows + count)
        self._buffer("tokens", {**self._token_rows(source, steps, requests, positions), "row": row})
        has_query = _has_query(batch, steps)
        self._writer.append(
            "rows",
            {
                "row": row,
                "step": numbers,
                "request": requests,
                "position": positions,
                "has_query": has_query,
            },
        )
        shares = _shares(requests)
        for request, share in shares.items():
            self._histories.add_rows(request, row[share])
            self._models_of[request] = model
        for layer in batch.layers:
            self._write_layer(model, layer, shares, positions, has_query, steps[0][0])
        for number in self._writer.awaited:
            # The other half of an encoder-decoder did not run.
            self._writer.append_layer(model, number)

    def _write_layer(
        self,
        model: int,
        layer: LayerRows,
        shares: Mapping[int, Index],
        positions: NDArray[np.int64],
        has_query: NDArray[np.bool_],
        number: int,
    ) -> None:
        arrays: dict[str, NDArray[Any] | None] = {}
        for kind in ("q", "k", "v", "lse", "key_norm", "value_norm"):
            given = getattr(layer, kind)
            if given is None:
                continue
            values, narrowed = finite_float16(given)
            arrays[kind] = values
            if kind in layer.only_summed:
                continue
            if narrowed:
                self._note(f"{kind} values", narrowed, NARROWED, number)
            self.nbytes += values.nbytes
        q, k = arrays.get("q"), arrays.get("k")
        # What is summed over a prompt takes the queries of all its rows.
        with_query = np.ones_like(has_query) if layer.summed else has_query
        queries = Queries(q, with_query, positions)
        received = list(layer.received)
        if layer.spec.attention_kind == "cross":
            arrays["lse"] = self._cross_lse(layer, queries, k, shares, number)
        elif k is not None:
            found, summed = self._lse(layer, queries, k, shares, number)
            received += summed
            if found is not None and "lse" not in arrays and "q" not in layer.only_summed:
                arrays["lse"] = found[has_query]
        if layer.summed and q is not None:
            arrays["q"] = q[has_query]
        for kind in layer.only_summed:
            arrays.pop(kind, None)
        self._writer.append_layer(model, layer.spec.layer, **arrays)
        for one in received:
            stop = one.first + len(one.values)
            rows = self._histories.rows(one.request)[one.first : stop]
            self._writer.add_received(model, layer.spec.layer, rows, one.values)

    def _lse(
        self,
        layer: LayerRows,
        queries: Queries,
        k: NDArray[Any],
        shares: Mapping[int, Index],
        number: int,
    ) -> tuple[NDArray[np.float32] | None, list[Received]]:
        """[row, q_head] of all rows, NaN for those without; and what prompts' keys received."""
        found = np.full((len(k), layer.spec.num_q_heads), np.nan, np.float32)
        summed = {one.request: one for one in layer.summed}
        received = []
        for request, share in shares.items():
            if "k" in layer.only_summed and request not in summed:
                continue
            history = self._histories.of(request, layer.spec.layer)
            if history.tokens != int(queries.positions[share][0]):
                self._note("lse", len(k[share]), KEYS_GONE, number)
                continue
            history.extend(k[share])
            q, rows, positions = queries.of(share)
            if q is None or not len(q) or layer.lse is not None:
                continue
            one = summed.get(request)
            if one is None:
                found[rows] = row_lse(q, history, positions, layer.spec, layer.sinks)
                continue
            found[rows], values = row_sums(q, history, positions, layer, one.rows)
            received.append(Received(request, 0, values))
            if one.ends and "k" in layer.only_summed:
                self._histories.forget(request, layer.spec.layer)
        return (None if queries.q is None else found), received

    def _cross_lse(
        self,
        layer: LayerRows,
        queries: Queries,
        k: NDArray[Any] | None,
        shares: Mapping[int, Index],
        number: int,
    ) -> NDArray[np.float32] | None:
        """Of a decoder's rows, over all keys of its encoder; of an encoder's, its keys are kept."""
        if k is not None:
            for request, share in shares.items():
                self._histories.of(request, layer.spec.layer).extend(k[share])
        if queries.q is None:
            return None
        found = np.full((len(queries.has_query), layer.spec.num_q_heads), np.nan, np.float32)
        for request, share in shares.items():
            history = self._histories.of(self._encoders.get(request, request), layer.spec.layer)
            q, rows, positions = queries.of(share)
            if q is None or not len(q):
                continue
            if history.tokens:
                found[rows] = row_lse(q, history, positions, layer.spec)
            else:
                self._note("lse", len(q), KEYS_GONE, number)
        return found[queries.has_query]

    def _keys_of(self, request: int, rows: NDArray[np.int64]) -> dict[int, NDArray[Any]]:
        self.commit()
        return self._writer.read_back("k", self._models_of[request], rows)

    def _fork(self, forks: Sequence[ForkedRequest]) -> None:
        if not forks:
            return
        row = self._writer.rows
        for fork in forks:
            self._writer.add_fork(fork.request, fork.source, fork.tokens)
        self._histories.fork([Fork(row, f.request, f.source, f.tokens) for f in forks])

    def _token_rows(
        self,
        source: str,
        steps: Sequence[tuple[int, StepRecord]],
        requests: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> dict[str, Iterable[Any]]:
        ids: list[int | None] = []
        sources: list[str] = []
        for _, step in steps:
            count = sum(sequence.count for sequence in step.sequences)
            ids += [None] * count if step.token_ids is None else step.token_ids
            for sequence in step.sequences:
                prompt = _prompt_share(sequence, step.phase)
                sources += ["prompt"] * prompt + ["generated"] * (sequence.count - prompt)
        texts = self._texts.get(source, {})
        return {
            "request": requests,
            "position": positions,
            "token_id": ids,
            "text": [None if x is None else texts.get(x) for x in ids],
            "source": sources,
        }

    def _end(self, message: Ended) -> None:
        count = len(message.requests)
        for request in message.requests:
            self._histories.end(request)
            self._models_of.pop(request, None)
            self._encoders.pop(request, None)
        if message.freed_ns is not None:
            freed: dict[str, Iterable[Any]] = {name: [None] * count for name in _EVENT_COLUMNS} | {
                "ts_ns": [message.freed_ns] * count,
                "request": list(message.requests),
                "event": ["free"] * count,
                "tokens": [0] * count,
                "bytes": [0] * count,
            }
            self._buffer("kv_events", freed)

    def _buffer(self, table: str, columns: dict[str, Iterable[Any]]) -> None:
        held = self._buffers.setdefault(table, {name: [] for name in columns})
        for name, values in columns.items():
            held[name].extend(values)

    def _note(self, what: str, count: int, reason: str, step: int | None) -> None:
        # A fault repeats at every step that follows it: one row a commit, not one a step.
        first, held = self._gaps.get((what, reason), (step, 0))
        self._gaps[what, reason] = (first, held + count)
        self.reasons[reason] = self.reasons.get(reason, 0) + count


def _has_query(batch: StepBatch, steps: Sequence[tuple[int, StepRecord]]) -> NDArray[np.bool_]:
    """[row]: which rows of some steps keep their query."""
    known = any(layer.q is not None for layer in batch.layers)
    parts = []
    for _, step in steps:
        count = sum(sequence.count for sequence in step.sequences)
        parts.append(np.full(count, known) if step.queries is None else step.queries)
    return np.concatenate(parts)


def _row_columns(
    steps: Sequence[tuple[int, StepRecord]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Step, request and position of every row of some steps."""
    parts = [(number, s) for number, step in steps for s in step.sequences]
    counts = [s.count for _, s in parts]
    positions = [np.arange(s.position, s.position + s.count) for _, s in parts]
    return (
        np.repeat(np.array([number for number, _ in parts], np.int64), counts),
        np.repeat(np.array([s.request for _, s in parts], np.int64), counts),
        np.concatenate(positions).astype(np.int64),
    )


def _shares(requests: NDArray[np.int64]) -> dict[int, Index]:
    """Rows of each request, in order of position; a slice where they stand together."""
    found: dict[int, Index] = {}
    for request in np.unique(requests):
        rows = np.flatnonzero(requests == request)
        first, last = int(rows[0]), int(rows[-1])
        found[int(request)] = slice(first, last + 1) if last - first + 1 == len(rows) else rows
    return found


def _step_rows(first: int, model: int, steps: Sequence[StepRecord]) -> dict[str, list[Any]]:
    return {
        "step": list(range(first, first + len(steps))),
        "run": [0] * len(steps),
        "model": [model] * len(steps),
        "phase": [step.phase for step in steps],
        "batch_size": [step.batch_size for step in steps],
        "num_tokens": [step.num_tokens for step in steps],
        "started_ns": [step.started_ns for step in steps],
        "duration_ns": [step.duration_ns for step in steps],
        "training_step": [step.training_step for step in steps],
    }


def _request_rows(model: int, steps: Sequence[tuple[int, StepRecord]]) -> dict[str, Iterable[Any]]:
    new = [(step, s) for _, step in steps for s in step.sequences if s.new]
    return {
        "request": [s.request for _, s in new],
        "run": [0] * len(new),
        "model": [model] * len(new),
        "external_id": [s.external_id for _, s in new],
        "batch_index": [s.batch_index for _, s in new],
        "prompt_tokens": [s.prompt_tokens for _, s in new],
        "encoder_request": [s.encoder_request for _, s in new],
        "started_ns": [step.started_ns for step, _ in new],
        "arrived_ns": [s.arrived_ns for _, s in new],
    }


def _rowless(model: int, message: RowlessRequest) -> dict[str, Iterable[Any]]:
    row = {
        "request": message.request,
        "run": 0,
        "model": model,
        "external_id": message.external_id,
        "batch_index": None,
        "prompt_tokens": message.prompt_tokens,
        "encoder_request": None,
        "started_ns": message.started_ns,
        "arrived_ns": None,
    }
    return {name: [value] for name, value in row.items()}


def _prompt_share(sequence: Sequenced, phase: str) -> int:
    """How many of a step's tokens of one request are its prompt's."""
    if sequence.from_prompt is not None:
        return sequence.from_prompt
    if phase == "decode":
        return 0
    if not sequence.new:
        return sequence.count
    return min(sequence.count, max(0, sequence.prompt_tokens - sequence.position))


def _grown(step: StepRecord, growth: Sequence[LayerGrowth]) -> list[CacheEvent]:
    """Events of a step that grew every layer by its tokens."""
    slots, at_ns = step.slots or 0, step.started_ns + step.duration_ns
    return [
        CacheEvent(at_ns, one.layer, "grow", slots, slots * one.nbytes, one.device)
        for one in growth
    ]


def _event_rows(number: int | None, events: Sequence[CacheEvent]) -> dict[str, Iterable[Any]]:
    columns = zip(*events, strict=True) if events else ((),) * len(CacheEvent._fields)
    found: dict[str, Iterable[Any]] = dict(zip(CacheEvent._fields, columns, strict=True))
    found["bytes"] = found.pop("nbytes")
    return {**found, "step": [number] * len(events)}


def row_sums(
    q: NDArray[Any],
    history: KeyHistory,
    positions: NDArray[np.int64],
    layer: LayerRows,
    prompt: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log-sum-exps [row, q_head] of a request's rows, and what keys received from the first.

    Parameters
    ----------
    prompt : int
        Rows of the prompt, which come first: [key, q_head] is what its keys received from them.
    """
    received = np.zeros((layer.spec.num_q_heads, history.tokens), np.float32)
    found = row_lse(
        q[:prompt], history, positions[:prompt], layer.spec, layer.sinks, received=received
    )
    if prompt < len(q):
        rest = row_lse(q[prompt:], history, positions[prompt:], layer.spec, layer.sinks)
        found = np.concatenate([found, rest])
    stop = int(positions[prompt - 1]) + 1
    return found, np.ascontiguousarray(received[:, :stop].T)
