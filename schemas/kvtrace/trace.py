"""Reading a trace: `kvtrace.open(path)`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from kvtrace import database, sql, tables
from kvtrace.errors import InputError, TraceError
from kvtrace.holdings import Holdings, joined
from kvtrace.layout import REPLAYS
from kvtrace.manifest import Manifest, is_trace, read_manifest
from kvtrace.model import Layer, LayerData, Request
from kvtrace.rank_arrays import Float, RankArrays
from kvtrace.rank_index import Ids, RankIndex
from kvtrace.store import StoreReader
from kvtrace.writer import directory_bytes


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
        self._open()

    def _open(self) -> None:
        self._index = RankIndex(self.path, self._store)
        self._arrays = RankArrays(self._index)

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
        return self._index.rows

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
        self._open()

    def table(self, name: str) -> pa.Table:
        """A whole table of schema.sql, as the rank wrote it; replays' tables hold them all."""
        if name in tables.REPLAY_TABLES:
            parts = [store.table(name) for store in database.replay_parts(self.path)]
            return pa.concat_tables(parts) if parts else tables.arrow_schemas()[name].empty_table()
        return self._index.table(name)

    def sql(self, query: str, **limits: Any) -> pa.Table:
        """Run one reading SQL statement over all ranks; see `kvtrace.sql.query` for limits."""
        closed = all(store.closed for store in self._stores.values())
        return sql.query(self.path, query, closed=closed, **limits)

    @property
    def layers(self) -> list[Layer]:
        """Attention layers, in order."""
        return self._index.layers

    @property
    def signals(self) -> frozenset[str]:
        """What was recorded for every row and layer: of q, k, v, lse, q_prerope, wo and more.

        `received` is in it where some prompt has it; see `holdings` for one request.
        """
        return self._arrays.signals

    @property
    def selection(self) -> dict[str, Any]:
        """What was asked for: layers, heads, queries, max_bytes; empty where not said."""
        return self._index.selection

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
        return self._arrays.holdings(request)

    def requests(self) -> list[Request]:
        """Sequences, in order of their start; only those with committed tokens."""
        return self._index.requests()

    def tokens(self, request: int = 0) -> pa.Table:
        """Tokens of a request by position: position, token_id, text, source.

        Tokens that came by a fork are those of the rows it brought.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._index.tokens(request)

    def request_rows(self, request: int = 0) -> Ids:
        """Row of each position of a request: int64 [token].

        A position that was processed twice (after a crop) stands for its latest row; what a fork
        brought (table `forks`) stands for the source's rows.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._index.request_rows(request)

    def layers_of(self, request: int = 0) -> list[Layer]:
        """Layers that a request ran through, in order.

        In an encoder-decoder those of the encoder for the encoder's request; for the decoder's
        its own layers and cross attention.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._index.layers_of(request)

    def key_request(self, layer: int, request: int = 0) -> int:
        """The request whose tokens are a layer's keys: the encoder's in a cross layer.

        Raises
        ------
        InputError
            For a layer or request the trace does not have.
        """
        return self._index.key_request(layer, request)

    def layer_data(self, layer: int, request: int = 0) -> LayerData:
        """q, k, v, lse and received of one layer of one request, as float32."""
        return self._arrays.layer_data(layer, request)

    def row_array(self, kind: str, layer: int, request: int = 0) -> Float:
        """One kind of row array (`q_prerope`, say) of one layer, by position, as float32."""
        return self._arrays.row_array(kind, layer, request)

    def static(self, name: str) -> NDArray[Any]:
        """An array without a row axis, such as `wo [layer, hidden, q_head*head_dim]`."""
        return self._arrays.static(name)

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
        return self._arrays.attention(layer, head, rows, keys, request)

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
