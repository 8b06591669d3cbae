"""Turns messages into a trace's tables and arrays; runs in the writer thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtrace.writer import TraceWriter
from kvtrace_recorder.lse import KeyHistory, row_lse
from kvtrace_recorder.messages import (
    Ended,
    Gap,
    LayerRows,
    Message,
    ModelInfo,
    StepRecord,
    finite_float16,
)

_EVENT_COLUMNS = ("ts_ns", "step", "request", "layer", "event", "tokens", "bytes", "device")
NARROWED = "beyond the range of float16, stored as its largest; record with dtype float32"


class Texts(Protocol):
    """Gives the text of a token; see `kvtrace_recorder.tokens.texts`."""

    def of(self, source: str, token_id: int) -> str | None:
        """Text of a token of the model that came from `source`; None where unknown."""


class Scribe:
    """Writes steps into a trace.

    Parameters
    ----------
    writer : TraceWriter
        The trace.
    texts : Texts
        Gives tokens their text.
    """

    def __init__(self, writer: TraceWriter, texts: Texts) -> None:
        self._writer = writer
        self._texts = texts
        self._models: dict[int, int] = {}
        self._layered: set[int] = set()
        self._histories: dict[int, dict[int, KeyHistory]] = {}
        self._buffers: dict[str, dict[str, list[Any]]] = {}
        self._gaps: dict[tuple[str, str], tuple[int | None, int]] = {}
        self.reasons: dict[str, int] = {}
        self.steps = 0
        self.requests = 0
        self.nbytes = 0

    def write(self, message: Message) -> None:
        """Write one message."""
        if isinstance(message, StepRecord):
            self._write_step(message)
        elif isinstance(message, Ended):
            self._end(message)
        elif isinstance(message, Gap):
            self._note(message.what, message.count, message.reason, None)

    def commit(self) -> None:
        """Make everything written so far visible to readers."""
        self.flush()
        self._writer.commit()

    def flush(self) -> None:
        """Hand buffered table rows to the writer."""
        for table, columns in self._buffers.items():
            self._writer.append(table, columns)
        self._buffers = {}
        for (what, reason), (step, count) in self._gaps.items():
            self._writer.add_gap(what, count, reason, step)
        self._gaps = {}

    def _write_step(self, step: StepRecord) -> None:
        number = self.steps
        self.steps += 1
        model = self._model(step.model)
        self._writer.append("steps", _step_row(number, model, step))
        self._buffer("kv_events", _event_rows(number, step))
        if step.fault is not None:
            self._note("tokens", step.num_tokens, step.fault, number)
        elif step.num_tokens:
            self._write_rows(number, model, step)

    def _write_rows(self, number: int, model: int, step: StepRecord) -> None:
        if model not in self._layered:
            self._writer.add_layers(model, [x.spec for _, x in sorted(step.layers.items())])
            self._layered.add(model)
        requests, positions = _columns(step)
        rows = np.arange(self._writer.rows, self._writer.rows + len(requests))
        has_query = any(layer.q is not None for layer in step.layers.values())
        self._buffer("requests", _request_rows(model, step))
        self._buffer("tokens", self._token_rows(step, requests, positions))
        self._writer.append(
            "rows",
            {
                "row": rows,
                "step": np.full(len(rows), number),
                "request": requests,
                "position": positions,
                "has_query": np.full(len(rows), has_query),
            },
        )
        self.requests += sum(sequence.new for sequence in step.sequences)
        for layer, data in step.layers.items():
            self._write_layer(number, model, layer, step, data)

    def _write_layer(
        self, number: int, model: int, layer: int, step: StepRecord, data: LayerRows
    ) -> None:
        arrays: dict[str, NDArray[Any] | None] = {}
        for kind in ("q", "k", "v"):
            values = getattr(data, kind)
            if values is not None:
                values, narrowed = finite_float16(values)
                if narrowed:
                    self._note(f"{kind} values", narrowed, NARROWED, number)
                self.nbytes += values.nbytes
            arrays[kind] = values
        if arrays["q"] is not None and arrays["k"] is not None:
            arrays["lse"] = self._lse(arrays["q"], arrays["k"], step, data)
        self._writer.append_layer(model, layer, **arrays)

    def _lse(
        self, q: NDArray[Any], k: NDArray[Any], step: StepRecord, data: LayerRows
    ) -> NDArray[np.float32]:
        found = np.empty(q.shape[:2], np.float32)
        start = 0
        for sequence in step.sequences:
            stop = start + sequence.count
            histories = self._histories.setdefault(sequence.request, {})
            history = histories.setdefault(data.spec.layer, KeyHistory())
            history.extend(k[start:stop])
            found[start:stop] = row_lse(
                q[start:stop], history.keys, sequence.position, data.spec, data.sinks
            )
            start = stop
        return found

    def _token_rows(
        self, step: StepRecord, requests: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> dict[str, Iterable[Any]]:
        ids: list[int | None] = [None] * len(requests)
        if step.token_ids is not None:
            ids = [int(x) for x in step.token_ids]
        source = step.model.source
        return {
            "request": requests,
            "position": positions,
            "token_id": ids,
            "text": [None if x is None else self._texts.of(source, x) for x in ids],
            "source": ["generated" if step.phase == "decode" else "prompt"] * len(requests),
        }

    def _model(self, info: ModelInfo) -> int:
        if info.key not in self._models:
            self._models[info.key] = self._writer.add_model(**info.columns)
        return self._models[info.key]

    def _end(self, message: Ended) -> None:
        count = len(message.requests)
        for request in message.requests:
            self._histories.pop(request, None)
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


def _columns(step: StepRecord) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Request and position of every row of a step."""
    sequences = step.sequences
    requests = np.repeat([s.request for s in sequences], [s.count for s in sequences])
    positions = [np.arange(s.position, s.position + s.count) for s in sequences]
    return requests.astype(np.int64), np.concatenate(positions).astype(np.int64)


def _step_row(number: int, model: int, step: StepRecord) -> dict[str, list[Any]]:
    return {
        "step": [number],
        "run": [0],
        "model": [model],
        "phase": [step.phase],
        "batch_size": [step.batch_size],
        "num_tokens": [step.num_tokens],
        "started_ns": [step.started_ns],
        "duration_ns": [step.duration_ns],
    }


def _request_rows(model: int, step: StepRecord) -> dict[str, Iterable[Any]]:
    new = [sequence for sequence in step.sequences if sequence.new]
    return {
        "request": [s.request for s in new],
        "run": [0] * len(new),
        "model": [model] * len(new),
        "batch_index": [s.batch_index for s in new],
        "prompt_tokens": [s.count for s in new],
        "started_ns": [step.started_ns] * len(new),
    }


def _event_rows(number: int, step: StepRecord) -> dict[str, Iterable[Any]]:
    events = step.events
    return {
        "ts_ns": [e.ts_ns for e in events],
        "step": [number] * len(events),
        "request": [None] * len(events),
        "layer": [e.layer for e in events],
        "event": [e.event for e in events],
        "tokens": [e.tokens for e in events],
        "bytes": [e.nbytes for e in events],
        "device": [e.device for e in events],
    }
