"""Writing a trace: models and layers, steps of rows, and what each layer saw of them."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import duckdb
import numpy as np
from numpy.typing import NDArray

from kvtrace import database
from kvtrace.array_reader import RowArrayReader
from kvtrace.clocks import ClockNotes
from kvtrace.errors import InputError
from kvtrace.files import sync
from kvtrace.layout import DETAIL_ARRAYS, MANIFEST, QUERY_ARRAYS, array_name, rank_directory
from kvtrace.manifest import Manifest
from kvtrace.ranks import claim_rank, make_trace, numbered
from kvtrace.store import StoreReader, StoreWriter
from kvtrace.version import __version__

Array = NDArray[Any]
Rows = NDArray[np.int64]

#: Rows that are filled up with NaN at a time where some have no query.
STRETCH_ROWS = 4096
#: Axes behind (row, layer) of each kind of row array, and its type where that is not the trace's.
ROW_ARRAYS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "q": (("q_head", "head_dim"), None),
    "k": (("kv_head", "head_dim"), None),
    "v": (("kv_head", "value_dim"), None),
    "lse": (("q_head",), "float32"),
    "q_prerope": (("q_head", "head_dim"), None),
    "key_norm": (("kv_head",), "float32"),
    "value_norm": (("kv_head",), "float32"),
    "received": (("q_head",), "float32"),
    "score": (("kv_head",), "float32"),
}
#: Kinds that grow after their rows were written; see `kvtrace.sums`.
SUM_ARRAYS = frozenset({"received"})
#: Why values of a float16 trace differ; infinities would make whole rows unusable.
NARROWED = "beyond the range of float16, stored as its largest; record with dtype float32"
#: Rows no further apart than this are read back in one go.
NEAR = 256
_AXIS_FIELD = {
    "q_head": "num_q_heads",
    "kv_head": "num_kv_heads",
    "head_dim": "head_dim",
    "value_dim": "value_dim",
}


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of a model; fields are the columns of table `layers`."""

    layer: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    attention_kind: str = "full"
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    rope_theta: float | None = None
    name: str | None = None
    kv_heads: tuple[int, ...] | None = None
    alibi_slopes: tuple[float, ...] | None = None
    position_bias: tuple[tuple[float, ...], ...] | None = None
    model_kv_heads: int | None = None


@dataclass
class _Lane:
    """Where a layer's rows go."""

    group: int
    index: int
    kinds: tuple[str, ...]
    spec: LayerSpec


class TraceWriter:
    """Writes one process's part of a trace. Not thread-safe: one thread owns it.

    Numbers of rows, steps, requests, models and blocks are given to it as the process counts them,
    from 0; in the trace those of rank r begin at r * 1,000,000,000.

    Parameters
    ----------
    path : path-like
        The trace directory to make.
    source : {"recorded", "imported", "synthetic"}
        Where the data comes from; shown wherever the trace is.
    command : sequence of str
        The command line, for the record.
    detail : {"events", "summary", "qk", "qkv"}
        Which arrays are kept.
    dtype : {"float16", "float32"}
        Storage type of q, k and v.
    extra : sequence of str
        Further row arrays ("q_prerope").
    selection : mapping, optional
        What of them was asked for (layers, heads, queries, max_bytes); kept as `runs.selection`.
    force : bool
        Replace an existing trace. Nothing but a trace or an empty directory is ever replaced.
    versions : mapping of str to str, optional
        Versions of the libraries recorded from ("torch", "transformers").
    rank : int or None
        Number of this process's folder; None: the next free one.
    launch : str, optional
        What the processes of one launch have in common. With it the trace is made by the first of
        them and joined by the others.
    pid : int, optional
        The process that is recorded; by default this one.
    durable : bool
        Whether a commit outlives a power cut; see `kvtrace.store.StoreWriter`.

    Raises
    ------
    TraceError
        Where `path` exists and may not be replaced or joined, or the rank is taken.
    InputError
        For an unknown detail or dtype.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        source: str = "recorded",
        command: Sequence[str] = (),
        detail: str = "qkv",
        dtype: str = "float16",
        extra: Sequence[str] = (),
        selection: Mapping[str, Any] | None = None,
        force: bool = False,
        versions: Mapping[str, str] | None = None,
        rank: int | None = 0,
        launch: str | None = None,
        pid: int | None = None,
        durable: bool = False,
    ) -> None:
        check_choice("detail", detail, DETAIL_ARRAYS)
        check_choice("dtype", dtype, ("float16", "float32"))
        self.path = Path(path)
        now = time.time_ns()
        manifest = Manifest(__version__, now, source, list(command), launch=launch)
        make_trace(self.path, manifest, force=force)
        self.rank = claim_rank(self.path, rank)
        self.dtype = dtype
        kinds = (*DETAIL_ARRAYS[detail], *extra)
        self._kinds = tuple(kind for kind in kinds if kind not in SUM_ARRAYS)
        self._group_specs: dict[int, list[LayerSpec]] = {}
        self._summed: set[int] = set()
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._groups = 0
        self._awaited: set[tuple[int, int]] = set()
        self._step_rows = 0
        self._step_model = 0
        #: Which rows of the step have a query; None where all.
        self._queries: Rows | None = None
        self._overflow: dict[str, int] = {}
        self._models = 0
        self._closed = False
        self._store = StoreWriter(self.path / rank_directory(self.rank), durable=durable)
        if durable:
            for path in (self.path / MANIFEST, self.path, self.path.parent):
                sync(path)
        run = _run_row(now, source, command, detail, dtype, versions or {}, selection)
        self.append("runs", {**run, "pid": [pid or os.getpid()]})
        # Imported times are of another clock.
        self._clocks = ClockNotes() if source == "recorded" else None
        self._note_clocks("start")
        self.rows = 0

    def add_model(self, *, config: Mapping[str, Any] | None = None, **columns: Any) -> int:
        """Register a model; keywords are the columns of table `models`. Returns its number."""
        model = self._models
        self._models += 1
        text = json.dumps(dict(config or {}), default=str, sort_keys=True)
        row = {"model": model, "config": text, **columns}
        self.append("models", {name: [value] for name, value in row.items()})
        return model

    def add_layers(self, model: int, layers: Sequence[LayerSpec]) -> None:
        """Register layers of a model before their first rows; makes the arrays they need.

        Layers that come together share arrays where their shapes agree. Of an encoder-decoder
        those of the decoder come later; each layer comes once.
        """
        by_shape: dict[tuple[int, ...], list[LayerSpec]] = {}
        for spec in layers:
            key = (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim)
            by_shape.setdefault(key, []).append(spec)
        for specs in by_shape.values():
            group = self._groups
            self._groups += 1
            self._group_specs[group] = specs
            for kind in self._kinds:
                self._declare(kind, group)
            for index, spec in enumerate(specs):
                if self._kinds:
                    self._lanes[model, spec.layer] = _Lane(group, index, self._kinds, spec)
                row = {
                    **asdict(spec),
                    "model": model,
                    "array_group": group,
                    "array_index": index,
                }
                self.append("layers", {name: [value] for name, value in row.items()})

    def append(self, table: str, values: Mapping[str, Sequence[Any] | Array]) -> None:
        """Buffer rows of a table.

        Appending to `steps` names the step's model; appending to `rows` then begins a step of
        that many array rows, which waits for `append_layer` of each of the model's layers.
        """
        if table == "steps":
            self._step_model = int(values["model"][-1])
        elif table == "rows":
            self._begin_step(values)
        self._store.append(table, numbered(table, values, self.rank))

    def add_fork(self, request: int, source: int, tokens: int) -> None:
        """Let `request` go on from the first `tokens` tokens of `source` (itself for a crop).

        It counts from the next row that is written. Forks between the same two rows happen at
        once: each finds its source as it stood before all of them.
        """
        row = {"row": self.rows, "request": request, "source": source, "tokens": tokens}
        self.append("forks", {name: [value] for name, value in row.items()})

    def put_static(self, name: str, values: Array, axes: str) -> None:
        """Keep an array without a row axis, such as the output projections `wo`."""
        self._store.put_static(name, values, axes)

    @property
    def awaited(self) -> list[int]:
        """Layers whose rows of the current step have not come."""
        return sorted(layer for _, layer in self._awaited)

    def append_layer(self, model: int, layer: int, **arrays: Array | None) -> None:
        """Add what one layer saw of the current step's n rows.

        Parameters
        ----------
        model, layer : int
            As registered.
        **arrays : numpy.ndarray or None
            q [n, q_head, head_dim], k [n, kv_head, head_dim], v [n, kv_head, value_dim],
            lse [n, q_head], key_norm, value_norm [n, kv_head]; a kept kind that is missing or
            None is stored as NaN. q, lse and q_prerope hold only the rows that `has_query` of
            table `rows` says have one; the others are NaN.

        Raises
        ------
        ValueError
            Where the layer is not awaited or the number of rows is not the step's.
        """
        if not self._kinds:
            # Of events alone no layer has rows.
            return
        if (model, layer) not in self._awaited:
            raise ValueError(f"layer {layer} of model {model} is not awaited in this step")
        lane = self._lanes[model, layer]
        for kind in lane.kinds:
            values = arrays.get(kind)
            name = array_name(kind, lane.group)
            self._store.pad(name, lane.index, self.rows - self._step_rows)
            if values is None:
                self._store.pad(name, lane.index, self.rows)
            else:
                self._append_values(name, lane.index, kind, values)
        self._awaited.discard((model, layer))

    def add_received(self, model: int, layer: int, rows: Rows, values: Array) -> None:
        """Add to what keys have received from the queries of their prompt.

        Parameters
        ----------
        model, layer : int
            As registered.
        rows : numpy.ndarray
            [n], the keys' rows, ascending; they may lie in steps long written.
        values : numpy.ndarray
            [n, q_head] float32, attention after the softmax, summed over some queries.
        """
        lane = self._lanes[model, layer]
        if lane.group not in self._summed:
            # Made when first needed: whether every query is kept may change while recording.
            self._summed.add(lane.group)
            self._declare("received", lane.group)
        self._store.add_rows(array_name("received", lane.group), lane.index, rows, values)

    def skip_layer(self, model: int, layer: int, reason: str) -> None:
        """Store the current step's rows of a layer as NaN, with a row in `gaps`."""
        self.add_gap("layer rows", self._step_rows, reason)
        self.append_layer(model, layer)

    def add_gap(self, what: str, count: int, reason: str, step: int | None = None) -> None:
        """Note something that the trace does not hold."""
        row = {"ts_ns": time.time_ns(), "step": step, "what": what, "count": count}
        self.append("gaps", {name: [value] for name, value in {**row, "reason": reason}.items()})

    def read_back(self, kind: str, model: int, rows: Rows) -> dict[int, Array]:
        """Rows that were committed before, of every layer of a model that has them.

        Parameters
        ----------
        kind : str
            q, k, v or lse.
        model : int
            Its number.
        rows : numpy.ndarray
            int64.

        Returns
        -------
        dict of int to numpy.ndarray
            By layer: [row, head, width], in the order of `rows`.
        """
        store = StoreReader(self._store.directory)
        return {
            layer: _picked(store.array(array_name(kind, lane.group)), rows, lane.index)
            for (owner, layer), lane in self._lanes.items()
            if owner == model and store.has_array(array_name(kind, lane.group))
        }

    def commit(self) -> bool:
        """Make everything appended so far visible; False in the middle of a step (nothing done)."""
        if self._awaited:
            return False
        if self._clocks is not None and self._clocks.due:
            self._note_clocks("commit")
        self._pad_lanes()
        self._store.commit(self.rows)
        return True

    def close(self, *, complete: bool = True) -> None:
        """Seal the arrays; the last rank to do so builds `trace.duckdb`. Once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._finish_step("the recording ended in the middle of a step")
            for kind, count in self._overflow.items():
                self.add_gap(f"{kind} values", count, NARROWED)
            self._note_clocks("close")
            self._pad_lanes()
            self._store.commit(self.rows)
        except BaseException:
            self._store.abandon()
            raise
        self._store.close(complete=complete)
        if all(store.closed for store in database.stores_by_rank(self.path).values()):
            # Without room for it the trace is whole: the first reader makes it.
            with suppress(OSError, duckdb.Error):
                database.build(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(complete=error is None)

    def _note_clocks(self, event: str) -> None:
        if self._clocks is not None:
            self.append("clock_sync", self._clocks.row(event))

    def _declare(self, kind: str, group: int) -> None:
        specs = self._group_specs[group]
        axes, dtype = ROW_ARRAYS[kind]
        tail = (len(specs), *(int(getattr(specs[0], _AXIS_FIELD[axis])) for axis in axes))
        name, dtype = array_name(kind, group), dtype or self.dtype
        names = ",".join(("row", "layer", *axes))
        declare = self._store.declare_sums if kind in SUM_ARRAYS else self._store.declare_array
        declare(name, tail=tail, dtype=dtype, axes=names)
        row = {
            "name": name,
            "kind": kind,
            "array_group": group,
            "dtype": dtype,
            "shape": json.dumps(tail),
            "axes": names,
        }
        self.append("array_catalog", {key: [value] for key, value in row.items()})

    def _begin_step(self, values: Mapping[str, Sequence[Any] | Array]) -> None:
        self._finish_step("the model did not run this layer in this step")
        ids = np.asarray(values["row"])
        if not np.array_equal(ids, np.arange(self.rows, self.rows + len(ids))):
            raise ValueError(f"row ids must go on from {self.rows}")
        self._step_rows = len(ids)
        asked = np.asarray(values["has_query"], bool)
        self._queries = None if asked.all() else np.flatnonzero(asked)
        self.rows += len(ids)
        self._awaited = {key for key in self._lanes if key[0] == self._step_model}

    def _finish_step(self, reason: str) -> None:
        for model, layer in sorted(self._awaited):
            self.skip_layer(model, layer, reason)

    def _append_values(self, name: str, lane: int, kind: str, values: Array) -> None:
        queries = self._queries if kind in QUERY_ARRAYS else None
        expected = self._step_rows if queries is None else len(queries)
        if len(values) != expected:
            raise ValueError(f"{kind} has {len(values)} rows; the step has {expected}")
        stored = np.dtype(ROW_ARRAYS[kind][1] or self.dtype)
        if values.dtype != stored:
            largest = np.finfo(stored).max
            if lost := int(np.count_nonzero(np.abs(values) > largest)):
                self._overflow[kind] = self._overflow.get(kind, 0) + lost
                values = np.clip(values, -largest, largest)
            values = values.astype(stored)
        if queries is None:
            self._store.append_lane(name, lane, values)
        else:
            self._append_some(name, lane, values, queries)

    def _append_some(self, name: str, lane: int, values: Array, queries: Rows) -> None:
        """Append the step's rows of which only `queries` have values, a stretch at a time."""
        first = self.rows - self._step_rows
        for start in range(0, self._step_rows, STRETCH_ROWS):
            stop = min(start + STRETCH_ROWS, self._step_rows)
            low, high = np.searchsorted(queries, (start, stop))
            if low < high:
                block = np.full((stop - start, *values.shape[1:]), np.nan, values.dtype)
                block[queries[low:high] - start] = values[low:high]
                self._store.append_lane(name, lane, block)
            else:
                self._store.pad(name, lane, first + stop)

    def _pad_lanes(self) -> None:
        # Rows of one model are holes in the arrays of another.
        for lane in self._lanes.values():
            for kind in lane.kinds:
                self._store.pad(array_name(kind, lane.group), lane.index, self.rows)


def _picked(array: RowArrayReader, rows: Rows, lane: int) -> Array:
    """Rows of one lane; those that stand near each other are read together."""
    steps = np.diff(rows)
    parts = np.split(rows, np.flatnonzero((steps < 0) | (steps > NEAR)) + 1)
    found = [array.read(int(x[0]), int(x[-1]) + 1, lane)[x - x[0]] for x in parts if len(x)]
    return np.concatenate(found) if found else np.empty((0, *array.shape[2:]), array.dtype)


def check_choice(what: str, found: str, choices: Any) -> None:
    """Refuse a value that is none of the choices, with an InputError that names them."""
    if found not in choices:
        raise InputError(f"{what} {found!r} is unknown; one of {', '.join(choices)} was expected")


def _run_row(
    now: int,
    source: str,
    command: Sequence[str],
    detail: str,
    dtype: str,
    versions: Mapping[str, str],
    selection: Mapping[str, Any] | None,
) -> dict[str, list[Any]]:
    row = {
        "run": 0,
        "source": source,
        "kvtrace_version": __version__,
        "started_ns": now,
        "command": json.dumps(list(command)),
        "host": platform.node(),
        "python": sys.version.split()[0],
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
        "detail": detail,
        "dtype": dtype,
        "selection": None if selection is None else json.dumps(dict(selection)),
    }
    return {name: [value] for name, value in row.items()}
