"""Tables computed from q, k and lse, for SQL: `cache/derived/`.

Computing them takes about what one pass over all attention maps takes, too long for the end of a
recording. So the first query that names one of them, or a view over them, makes them all; they are
kept as Parquet, deletable at any time, and copied into `trace.duckdb`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from kvtrace import tables
from kvtrace.checksums import FileSum, file_sum, verify_file
from kvtrace.console import progress
from kvtrace.errors import TraceError
from kvtrace.head_map import HeadMap
from kvtrace.head_sums import HeadSums, head_sums
from kvtrace.layout import CACHE
from kvtrace.marks import sink_distance
from kvtrace.store import publish

if TYPE_CHECKING:
    from kvtrace.model import Layer, LayerData
    from kvtrace.trace import Trace

DIRECTORY = f"{CACHE}/derived"
_STATE = "made_from.json"
#: Field of it that says what the files must be.
_SUMS = "files"
#: Rows of a table that are written together.
_GROUP_ROWS = 100_000
#: Two queries of one process that both need the tables: the second waits.
_MAKING = threading.Lock()

State = Mapping[int, int]
Columns = dict[str, Any]


def files(trace: Path, rows: State) -> dict[str, Path]:
    """Parquet files of the derived tables; none where they are missing or of another state.

    Parameters
    ----------
    trace : pathlib.Path
        The trace directory.
    rows : mapping of int to int
        Committed rows by rank: what tells one state of a trace from another.
    """
    folder = trace / DIRECTORY
    try:
        made_from = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {name: folder / f"{name}.parquet" for name in tables.DERIVED_TABLES}
    try:
        sums = {name: FileSum(*expected) for name, expected in made_from.pop(_SUMS).items()}
        for name, path in found.items():
            verify_file(path, sums[name])
    except (KeyError, TypeError, AttributeError, TraceError):
        # Damaged: made again.
        return {}
    return found if made_from == _state(rows) else {}


def make(trace: Trace, rows: State) -> None:
    """Compute the tables of a trace, unless they are there.

    Parameters
    ----------
    trace : Trace
        Opened at the state `rows`.
    rows : mapping of int to int
        Committed rows by rank.

    Raises
    ------
    TraceError
        Where they cannot be written.
    """
    with _MAKING:
        if files(trace.path, rows):
            return
        final = trace.path / DIRECTORY
        aside = final.with_name(f".derived.{os.getpid()}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _write(trace, aside)
            sums = {name: file_sum(aside / f"{name}.parquet") for name in tables.DERIVED_TABLES}
            state = {**_state(rows), _SUMS: sums}
            (aside / _STATE).write_text(json.dumps(state), encoding="utf-8")
            publish(aside, final)
        except OSError as error:
            raise TraceError(
                f"{final} cannot be written ({error.strerror or error}); the tables that a query"
                " of sinks, heads or keys needs are kept there; make it writable, or copy the"
                " trace to where it is"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _state(rows: State) -> dict[str, Any]:
    # The definitions too: another version may compute something else.
    return {
        "rows": {str(rank): rows[rank] for rank in sorted(rows)},
        "definitions": tables.digest(tables.derived_ddl()),
    }


def _write(trace: Trace, folder: Path) -> None:
    writers = {name: _TableWriter(folder, name) for name in tables.DERIVED_TABLES}
    requests = trace.requests()
    pairs = [(one.request, spec) for one in requests for spec in trace.layers_of(one.request)]
    for one in requests:
        writers["request_tokens"].add(_token_columns(trace, one.request))
    workers = len(os.sched_getaffinity(0))
    # A thread a head: BLAS's own threads on top of them took fifty times as long.
    with (
        progress("attention of keys and heads") as show,
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(workers) as pool,
    ):
        for number, (request, spec) in enumerate(pairs):
            data = trace.layer_data(spec.layer, request)
            heads = partial(_head_columns, request, spec, data)
            for made in pool.map(heads, range(spec.num_q_heads)):
                for name, columns in made.items():
                    writers[name].add(columns)
            show((number + 1) / len(pairs))
    for writer in writers.values():
        writer.close()


def _token_columns(trace: Trace, request: int) -> Columns:
    tokens = trace.tokens(request)
    columns = {name: tokens[name].combine_chunks() for name in tokens.column_names}
    rows = trace.request_rows(request)[: tokens.num_rows]
    return {"request": np.full(len(rows), request), "row": rows, **columns}


def _head_columns(request: int, spec: Layer, data: LayerData, at: int) -> dict[str, Columns]:
    """Rows of the tables of heads and keys for one query head, by its place in the arrays."""
    if data.q is None or data.k is None or data.lse is None:
        return {}
    q_head = spec.q_head_numbers[at]
    head = HeadMap(data, q_head)
    distance = sink_distance(head)
    sums = head_sums(head, distance)
    if not sums.rows.queries:
        return {}
    names: Columns = {
        "request": request,
        "layer": spec.layer,
        "q_head": q_head,
        "kv_head": spec.kv_head_numbers[at // spec.group_size],
    }
    found = {"head_attention": _one_row({**names, **_head_values(spec, sums, distance)})}
    if not spec.is_cross:
        found["key_attention"] = _key_columns(names, sums)
    return found


def _one_row(values: Columns) -> Columns:
    return {name: [value] for name, value in values.items()}


def _head_values(spec: Layer, sums: HeadSums, distance: int) -> Columns:
    rows, keys = sums.rows, sums.keys
    # Positions of a cross layer's queries and keys are of two sequences: nothing is near.
    own = not spec.is_cross and len(keys.far) > 0
    far = own and keys.far_queries[0] > 0
    return {
        "queries": rows.queries,
        "entropy": rows.entropy,
        "entropy_share": rows.entropy_share,
        "sparsity": rows.sparsity,
        "local_distance": distance if own else None,
        "local_share": rows.local_share if own else None,
        "first_token_share": float(keys.far[0] / keys.far_queries[0]) if far else None,
    }


def _key_columns(names: Columns, sums: HeadSums) -> Columns:
    keys = sums.keys
    count = len(keys.received)
    return {
        **{name: np.full(count, value) for name, value in names.items()},
        "position": np.arange(count),
        "queries": keys.queries,
        "received": keys.received,
        "uniform": keys.uniform,
        "far_queries": keys.far_queries,
        "far_received": keys.far,
        "seen_at_end": keys.seen_at_end,
    }


class _TableWriter:
    """Writes one table, many heads to a row group."""

    def __init__(self, folder: Path, name: str) -> None:
        self._schema = tables.derived_schemas()[name]
        self._writer = pq.ParquetWriter(
            folder / f"{name}.parquet", self._schema, compression="zstd"
        )
        self._pending: list[pa.Table] = []
        self._rows = 0

    def add(self, columns: Columns) -> None:
        self._pending.append(
            pa.table(
                {f.name: pa.array(columns[f.name]).cast(f.type) for f in self._schema},
                schema=self._schema,
            )
        )
        self._rows += self._pending[-1].num_rows
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending))
        self._pending, self._rows = [], 0
