"""Reading a trace: `kvtrace.open(path)`."""

from __future__ import annotations

import json
import os
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kvtrace import attention, database, sql, tables
from kvtrace.errors import InputError, TraceError
from kvtrace.holdings import Holdings, first_missing, joined
from kvtrace.layout import QUERY_ARRAYS, REPLAYS, array_name
from kvtrace.manifest import Manifest, is_trace, read_manifest
from kvtrace.model import Layer, LayerData, Request, number_text
from kvtrace.sequences import Fork, rows_by_request
from kvtrace.store import StoreReader
from kvtrace.writer import ROW_ARRAYS, directory_bytes

Float = NDArray[np.float32]
Ids = NDArray[np.int64]

#: What `refresh` forgets.
_CACHED = (
    "layers",
    "_models",
    "_encoders",
    "_prompt_tokens",
    "_row_index",
    "_forked_prompts",
    "_has_query",
    "_group_kinds",
    "_thinned",
)


class Trace:
    """A trace, finished, in progress, or cut off; reads what was committed.

    Parameters
    ----------
    path : path-like
        The trace directory.
    rank : int, optional
        The recording process whose rows, tables and arrays are read; default: the lowest.
        `sql`, `status` and `bytes` are about all of them.

    Raises
    ------
    TraceError
        Where there is no trace, one of a format this version cannot read, or no such rank.

    Examples
    --------
    >>> trace = kvtrace.open("traces/demo.kvtrace")        # doctest: +SKIP
    >>> trace.attention(layer=0, head=0)                   # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], rank: int | None = None) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._stores: dict[int, StoreReader] = database.stores_by_rank(self.path)
        if not self._stores:
            raise TraceError(
                f"{self.path} holds no rank; a recording was expected;"
                " it was killed before it wrote anything: record again"
            )
        self.rank = min(self._stores) if rank is None else rank
        if self.rank not in self._stores:
            have = ", ".join(map(str, self.ranks))
            raise TraceError(f"rank {rank} was not found in {self.path}; it has {have}")
        self._store = self._stores[self.rank]

    def __repr__(self) -> str:
        return f"<Trace {self.path} {self.status}, {self.rows} rows>"

    @property
    def name(self) -> str:
        """The directory's name without its suffix."""
        return self.path.stem

    @property
    def ranks(self) -> list[int]:
        """Numbers of the processes that recorded, in order."""
        return sorted(self._stores)

    @property
    def status(self) -> str:
        """complete, recording (a process is writing), or cut off (it died or was stopped).

        Of several processes: complete when all are, recording while any is.
        """
        found = [_status(store) for store in self._stores.values()]
        return next((state for state in ("recording", "cut off") if state in found), "complete")

    @property
    def rank_status(self) -> str:
        """The same of the rank alone."""
        return _status(self._store)

    @property
    def rows(self) -> int:
        """Tokens that the rank processed, over all requests: length of axis 0 of its arrays."""
        return self._store.rows

    @property
    def bytes(self) -> int:
        """Bytes on disk, replays and derived files included."""
        return directory_bytes(self.path)

    def refresh(self) -> None:
        """See the requests, tokens and layers that were committed since.

        Without it `rows` and `status` may move on, but no request grows under its reader.
        """
        for store in self._stores.values():
            store.refresh()
        self._stores = database.stores_by_rank(self.path) | self._stores
        for name in _CACHED:
            self.__dict__.pop(name, None)

    def table(self, name: str) -> pa.Table:
        """A whole table of schema.sql, as the rank wrote it; replays' tables hold them all."""
        if name in tables.REPLAY_TABLES:
            parts = [store.table(name) for store in database.replay_stores(self.path)]
            return pa.concat_tables(parts) if parts else tables.arrow_schemas()[name].empty_table()
        return self._store.table(name)

    def sql(self, query: str, **limits: Any) -> pa.Table:
        """Run one reading SQL statement over all ranks; see `kvtrace.sql.query` for limits."""
        closed = all(store.closed for store in self._stores.values())
        return sql.query(self.path, query, closed=closed, **limits)

    @cached_property
    def layers(self) -> list[Layer]:
        """Attention layers, in order."""
        found = [Layer(**row) for row in self.table("layers").to_pylist()]
        return sorted(found, key=lambda layer: (layer.model, layer.layer))

    @property
    def signals(self) -> frozenset[str]:
        """What was recorded for every row and layer: of q, k, v, lse, q_prerope, wo and more.

        `received` is in it where some prompt has it; see `holdings` for one request.
        """
        groups = list(self._group_kinds.values())
        found = set(frozenset.intersection(*groups)) if groups else set()
        if self._store.has_array("wo"):
            found.add("wo")
        if not self._has_query.all():
            found -= QUERY_ARRAYS
        return frozenset(found - {kind for _, _, kind in self._thinned})

    @cached_property
    def selection(self) -> dict[str, Any]:
        """What was asked for: layers, heads, queries, max_bytes; empty where not said."""
        runs = self.table("runs").to_pylist()
        return dict(json.loads(runs[0]["selection"] or "{}")) if runs else {}

    @property
    def queries(self) -> str:
        """Which queries of the prompts were kept: all, none, last=N, every=N, or several of it."""
        return joined([self.holdings(one.request).query_text for one in self.requests()]) or "none"

    def holdings(self, request: int = 0) -> Holdings:
        """What the trace holds of one request.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        rows = self.request_rows(request)
        prompt_tokens = self._prompt_tokens[request]
        # What is kept of a cross layer's keys is a matter of the encoder's request.
        specs = [spec for spec in self.layers_of(request) if not spec.is_cross]
        kinds = {spec.layer: self._stored(spec, int(rows.max())) for spec in specs}
        # Either all layers have it or none: a request that began under another rule has none, and
        # of shared or repeated prompts it is the sum over more queries than the request's.
        summed = [spec for spec in specs if "received" in kinds[spec.layer]]
        forked = request in self._forked_prompts
        if summed and (forked or not self._is_held("received", summed[0], int(rows[0]))):
            kinds = {layer: held - {"received"} for layer, held in kinds.items()}
        return Holdings(self._has_query[rows], min(prompt_tokens, len(rows)), kinds)

    def _stored(self, spec: Layer, last: int) -> frozenset[str]:
        """Row arrays of a layer that hold everything up to the row `last`."""
        thinned = {
            kind
            for (model, layer, kind), ends in self._thinned.items()
            if (model, layer) == (spec.model, spec.layer) and last >= ends
        }
        if "k" in thinned or "key_norm" in thinned:
            thinned |= set(ROW_ARRAYS)
        return self._group_kinds[spec.array_group] - thinned

    def requests(self) -> list[Request]:
        """Sequences, in order of their start; only those with committed tokens."""
        counts = {request: len(rows) for request, rows in self._row_index.items()}
        names = Request.__dataclass_fields__
        return [
            Request(
                tokens=counts[row["request"]],
                **{name: row[name] for name in names if name != "tokens"},
            )
            for row in self.table("requests").to_pylist()
            if row["request"] in counts
        ]

    def tokens(self, request: int = 0) -> pa.Table:
        """Tokens of a request by position: position, token_id, text, source.

        Tokens that came by a fork are those of the rows it brought.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        rows = self.request_rows(request)
        names = ["position", "token_id", "text", "source"]
        found = self.table("tokens")
        if not found["row"].null_count:
            return self._tokens_of_rows(found, rows).select(names)
        # Older traces do not say which row a token is.
        found = found.filter(pc.equal(found["request"], request)).sort_by("position")
        return found.select(names)

    def request_rows(self, request: int = 0) -> Ids:
        """Row of each position of a request: int64 [token].

        A position that was processed twice (after a crop) stands for its latest row; what a fork
        brought (table `forks`) stands for the source's rows.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        try:
            return self._row_index[request]
        except KeyError:
            have = ", ".join(map(str, list(self._row_index)[:8])) or "none"
            raise InputError(
                f"request {request} was not found in {self.path}; the trace has {have}"
            ) from None

    def layers_of(self, request: int = 0) -> list[Layer]:
        """Layers that a request ran through, in order.

        In an encoder-decoder those of the encoder for the encoder's request; for the decoder's
        its own layers and cross attention.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        self.request_rows(request)
        model = self._models[request]
        found = [spec for spec in self.layers if spec.model == model]
        if model not in self._paired_models:
            return found
        is_encoder = self._encoders[request] is None
        return [spec for spec in found if (spec.attention_kind == "bidirectional") == is_encoder]

    def key_request(self, layer: int, request: int = 0) -> int:
        """The request whose tokens are a layer's keys: the encoder's in a cross layer.

        Raises
        ------
        InputError
            For a layer or request the trace does not have.
        """
        source = self._encoders[request] if self._layer(layer, request).is_cross else None
        return request if source is None else source

    def layer_data(self, layer: int, request: int = 0) -> LayerData:
        """q, k, v, lse and received of one layer of one request, as float32."""
        rows, spec = self.request_rows(request), self._layer(layer, request)
        keys = self.request_rows(self.key_request(layer, request))
        at = {"q": rows, "k": keys, "v": keys, "lse": rows, "received": keys}
        found = {kind: self._read(kind, spec, where) for kind, where in at.items()}
        return LayerData(spec, **found)

    def row_array(self, kind: str, layer: int, request: int = 0) -> Float:
        """One kind of row array (`q_prerope`, say) of one layer, by position, as float32."""
        found = self._read(kind, self._layer(layer, request), self.request_rows(request))
        if found is None:
            raise InputError(f"{kind} was not found in {self.path}; it was not recorded")
        return found

    def static(self, name: str) -> NDArray[Any]:
        """An array without a row axis, such as `wo [layer, hidden, q_head*head_dim]`."""
        return self._store.static(name)

    def attention(
        self,
        layer: int,
        head: int,
        rows: slice | Ids | None = None,
        keys: slice | Ids | None = None,
        request: int = 0,
    ) -> Float:
        """Post-softmax attention of one query head, recomputed from q, k and lse.

        Parameters
        ----------
        layer, head : int
            Layer and query head, by the model's own numbers.
        rows, keys : slice, int array or None
            Positions in the request; None is all. In a cross layer keys are the encoder's tokens.
        request : int
            The request.

        Returns
        -------
        numpy.ndarray
            float32 [row, key]; zero where the key was not visible, NaN where the row's query
            was not kept.

        Raises
        ------
        InputError
            For a layer, head or position the trace does not have, a trace without q and k, and
            rows of which none has its query.
        """
        index = self.request_rows(request)
        spec = self._layer(layer, request)
        key_index = self.request_rows(self.key_request(layer, request))
        at = spec.q_head_index(head)
        row_at, key_at = _positions(rows, len(index)), _positions(keys, len(key_index))
        q = self._read("q", spec, index[row_at])
        k = self._read("k", spec, key_index[key_at])
        lse = self._read("lse", spec, index[row_at])
        if q is None or k is None or lse is None:
            raise InputError(
                f"{self.path} was recorded without q, k or lse; attention needs all three;"
                " record with --detail qk or qkv"
            )
        known = self._has_query[index[row_at]]
        if len(row_at) and not known.any():
            raise InputError(
                f"none of the {len(row_at)} rows asked for has its query in {self.path}, which kept"
                f" {self.holdings(request).query_text} of the prompt's; ask for other rows"
            )
        found = attention.weights(
            q[:, at], k[:, at // spec.group_size], lse[:, at], row_at, key_at, spec, at
        )
        # Hidden keys were set to zero in these rows too.
        found[~known] = np.nan
        return np.asarray(found, np.float32)

    def replays(self) -> pa.Table:
        """Stored replay results: table `replays`, oldest first."""
        return self.table("replays").sort_by("created_ns")

    def replay(self, name: str) -> StoreReader:
        """The store of one replay result: its tables and `evicted_at [row, layer, kv_head]`."""
        known = {store.directory.name: store for store in database.replay_stores(self.path)}
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            raise InputError(f"replay {name!r} was not found in {self.path}; it has {have}")
        return known[name]

    def replay_directory(self) -> Path:
        """Where replay results of this trace belong."""
        return self.path / REPLAYS

    @cached_property
    def _row_index(self) -> dict[int, Ids]:
        found = self.table("rows")
        row, request, position = (
            found[name].to_numpy().astype(np.int64) for name in ("row", "request", "position")
        )
        forks = [Fork(**fork) for fork in self.table("forks").to_pylist()]
        return rows_by_request(row, request, position, forks)

    @cached_property
    def _group_kinds(self) -> dict[int, frozenset[str]]:
        """Kinds of row arrays of each group of layers."""
        groups = {layer.array_group for layer in self.layers}
        has = self._store.has_array
        return {
            group: frozenset(kind for kind in ROW_ARRAYS if has(array_name(kind, group)))
            for group in groups
        }

    @cached_property
    def _prompt_tokens(self) -> dict[int, int]:
        found = self.table("requests")
        counts = found["prompt_tokens"].to_pylist()
        return dict(zip(found["request"].to_pylist(), counts, strict=True))

    @cached_property
    def _forked_prompts(self) -> set[int]:
        """Requests that share rows of their prompt with others, or processed some again."""
        found: set[int] = set()
        for fork in self.table("forks").to_pylist():
            if fork["source"] != fork["request"]:
                found |= {fork["source"], fork["request"]}
            elif fork["tokens"] < self._prompt_tokens.get(fork["request"], 0):
                found.add(fork["request"])
        return found

    @cached_property
    def _has_query(self) -> NDArray[np.bool_]:
        """[row]: whether the row's q and lse were kept."""
        found = self.table("rows")
        held = np.zeros(self.rows, bool)
        rows = found["row"].to_numpy()
        inside = rows < self.rows
        held[rows[inside]] = found["has_query"].to_numpy()[inside]
        return held

    @cached_property
    def _thinned(self) -> dict[tuple[int, int, str], int]:
        """First row that an array no longer holds, by model, layer and kind; complete ones not."""
        steps, rows = self.table("steps"), self.table("rows")
        models = dict(zip(steps["step"].to_pylist(), steps["model"].to_pylist(), strict=True))
        of_row = np.array([models.get(step, -1) for step in rows["step"].to_pylist()], np.int64)
        ids = rows["row"].to_numpy()
        found: dict[tuple[int, int, str], int] = {}
        # An encoder's layers hold nothing of a decoder's rows, nor the other way round.
        decoders = [request for request, source in self._encoders.items() if source is not None]
        of_decoder = np.isin(rows["request"].to_numpy(), decoders)
        for spec in self.layers:
            if spec.is_cross:
                continue
            here = (of_row == spec.model) & (ids < self.rows)
            if spec.model in self._paired_models:
                here &= of_decoder == (spec.attention_kind != "bidirectional")
            mine = ids[here]
            for kind in ("k", "v", "key_norm", "value_norm"):
                if kind in self._group_kinds[spec.array_group]:
                    ends = first_missing(mine, partial(self._is_held, kind, spec))
                    if ends is not None:
                        found[spec.model, spec.layer, kind] = ends
        return found

    def _is_held(self, kind: str, spec: Layer, row: int) -> bool:
        array = self._store.array(array_name(kind, spec.array_group))
        return bool(np.isfinite(array.read(row, row + 1, spec.array_index)).all())

    def _layer(self, layer: int, request: int) -> Layer:
        specs = {spec.layer: spec for spec in self.layers_of(request)}
        try:
            return specs[layer]
        except KeyError:
            have = number_text(list(specs)) or "none"
            raise InputError(
                f"layer {layer} was not found in request {request} of {self.path}; it has {have}"
            ) from None

    @cached_property
    def _encoders(self) -> dict[int, int | None]:
        """The request that each request's cross attention reads."""
        found = self.table("requests")
        sources = found["encoder_request"].to_pylist()
        return dict(zip(found["request"].to_pylist(), sources, strict=True))

    @property
    def _paired_models(self) -> set[int]:
        """Encoder-decoders of which a decoder ran."""
        sources = self._encoders.items()
        return {self._models[request] for request, source in sources if source is not None}

    @cached_property
    def _models(self) -> dict[int, int]:
        found = self.table("requests")
        return dict(zip(found["request"].to_pylist(), found["model"].to_pylist(), strict=True))

    def _tokens_of_rows(self, tokens: pa.Table, rows: Ids) -> pa.Table:
        row = tokens["row"].to_numpy()
        order = np.argsort(row)
        place = np.minimum(np.searchsorted(row, rows, sorter=order), max(len(row) - 1, 0))
        at = order[place] if len(row) else place
        missing = row[at] != rows if len(row) else np.ones(len(rows), bool)
        found = tokens.take(pa.array(at, mask=missing))
        positions = pa.array(np.arange(len(rows)), found.schema.field("position").type)
        return found.set_column(found.schema.get_field_index("position"), "position", positions)

    def _read(self, kind: str, spec: Layer, rows: Ids) -> Float | None:
        name = array_name(kind, spec.array_group)
        if not self._store.has_array(name):
            return None
        array = self._store.array(name)
        if not len(rows):
            return np.zeros((0, *array.shape[2:]), np.float32)
        first, last = int(rows.min()), int(rows.max()) + 1
        values = array.read(first, last, spec.array_index)
        if last - first != len(rows) or np.any(np.diff(rows) != 1):
            values = values[rows - first]
        return np.asarray(values, np.float32)


def open_trace(path: str | os.PathLike[str], rank: int | None = None) -> Trace:
    """Open a trace for reading, also while it is being recorded.

    Parameters
    ----------
    path : path-like
        The trace directory.
    rank : int, optional
        The recording process to read, where there are several; default: the lowest.

    Raises
    ------
    TraceError
        Where there is no trace, one of a format this version cannot read, or no such rank.
    """
    return Trace(path, rank)


def list_traces(root: str | os.PathLike[str]) -> list[Path]:
    """Trace directories at or under `root`, in order of their names.

    Traces are not looked for inside traces, in hidden folders, or through links.
    """
    found: list[Path] = []
    for folder, names, _ in os.walk(root):
        here = Path(folder)
        if is_trace(here):
            found.append(here)
            names.clear()
        names[:] = [name for name in names if not name.startswith(".")]
    return sorted(found)


def _status(store: StoreReader) -> str:
    if store.complete:
        return "complete"
    return "recording" if store.writer_alive else "cut off"


def _positions(asked: slice | Ids | None, tokens: int) -> Ids:
    if asked is None:
        return np.arange(tokens)
    if isinstance(asked, slice):
        return np.arange(tokens)[asked]
    found = np.asarray(asked, np.int64)
    if found.size and (found.min() < 0 or found.max() >= tokens):
        raise InputError(
            f"positions {found.min()} to {found.max()} were asked; the request has 0 to"
            f" {tokens - 1}"
        )
    return found
