"""Reading a trace: `kvtrace.open(path)`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from kvtrace import database, sql, tables
from kvtrace.clocks import RankClock, rank_clocks
from kvtrace.errors import InputError, TraceError
from kvtrace.functions import ArrayFunctions
from kvtrace.holdings import Holdings, joined
from kvtrace.layout import REPLAYS, WHATIFS
from kvtrace.manifest import Manifest, is_trace, read_manifest
from kvtrace.model import Layer, LayerData, Request
from kvtrace.places import RowPlaces
from kvtrace.rank_arrays import Float, RankArrays
from kvtrace.rank_index import Ids, RankIndex
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.shards import JoinedArrays, JoinedIndex, shard_groups
from kvtrace.sizes import directory_bytes
from kvtrace.store import StoreReader


class Trace:
    """A trace, finished, in progress, or cut off; reads what was committed.

    What several processes recorded is read as one: tables hold the rows of all, and numbers of
    requests, rows, steps, models and blocks tell whose they are (see `kvtrace.ranks`). Where ranks
    hold different heads of the same tokens, as under tensor parallelism, requests, rows and arrays
    are those of the first, with the heads of all (see `kvtrace.shards`).

    Parameters
    ----------
    path : path-like
        The trace directory.
    rank : int, optional
        Read only what this process recorded; `sql`, `bytes` and replays are still about all.

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
                " it has not begun to write, or was killed before: wait, or record again"
            )
        if rank is not None and rank not in self._stores:
            have = ", ".join(map(str, self.ranks))
            raise TraceError(f"rank {rank} was not found in {self.path}; it has {have}")
        self._rank = rank
        self._open()

    def _open(self) -> None:
        chosen = self.ranks if self._rank is None else [self._rank]
        self._indexes = {rank: RankIndex(self.path, rank, self._stores[rank]) for rank in chosen}
        groups = shard_groups(self._indexes)
        #: Of ranks that hold different heads of the same tokens, only the first is in these.
        self._units = {one[0].rank: JoinedIndex(one) if one[1:] else one[0] for one in groups}
        self._arrays = {
            rank: JoinedArrays(unit) if isinstance(unit, JoinedIndex) else RankArrays(unit)
            for rank, unit in self._units.items()
        }
        #: Ranks whose heads are read as those of another rank's requests, and that rank.
        self.shards = {one.rank: group[0].rank for group in groups for one in group[1:]}
        #: What SQL calls to reach the arrays, with what it read lately.
        self.functions = ArrayFunctions(self)

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
        found = [_status(index.store) for index in self._indexes.values()]
        return next((state for state in ("recording", "cut off") if state in found), "complete")

    @property
    def closed(self) -> bool:
        """Whether every process that recorded has finished."""
        return all(store.closed for store in self._stores.values())

    @property
    def rows(self) -> int:
        """Tokens processed, over all requests and ranks."""
        return self.places().rows

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
        """A whole table of schema.sql: rank after rank, each as it was written."""
        parts = list(self.table_parts(name))
        return pa.concat_tables(parts) if parts else tables.arrow_schemas()[name].empty_table()

    def table_parts(self, name: str) -> Iterator[pa.Table]:
        """The same, rank by rank and replay by replay."""
        if name in tables.REPLAY_TABLES:
            stores = database.replay_parts(self.path)
        else:
            stores = [index.store for index in self._indexes.values()]
        return (store.table(name) for store in stores)

    def sql(self, query: str, **limits: Any) -> pa.Table:
        """Run one reading SQL statement over all ranks; see `kvtrace.sql.query` for limits."""
        return sql.query(self, query, **limits)

    @property
    def layers(self) -> list[Layer]:
        """Attention layers, in order; those of every model, and of every rank that ran it."""
        return [layer for unit in self._units.values() for layer in unit.layers]

    @property
    def signals(self) -> frozenset[str]:
        """What was recorded for every row and layer: of q, k, v, lse, q_prerope, wo and more.

        `received` is in it where some prompt has it; see `holdings` for one request.
        """
        found = [one.signals for one in self._arrays.values() if one.has_layers]
        return frozenset.intersection(*found) if found else frozenset()

    @property
    def selection(self) -> dict[str, Any]:
        """What the first rank was asked for: layers, heads, queries, max_bytes; or nothing."""
        return next(iter(self._indexes.values())).selection

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
        return self._arrays[self._rank_of(request)].holdings(request)

    def requests(self) -> list[Request]:
        """Sequences, rank after rank in order of their start; only those with committed tokens."""
        return [request for unit in self._units.values() for request in unit.requests()]

    def tokens(self, request: int = 0) -> pa.Table:
        """Tokens of a request by position: position, token_id, text, source.

        Tokens that came by a fork are those of the rows it brought.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._units[self._rank_of(request)].tokens(request)

    def request_rows(self, request: int = 0) -> Ids:
        """Row of each position of a request: int64 [token].

        A position that was processed twice (after a crop) stands for its latest row; what a fork
        brought (table `forks`) stands for the source's rows.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._units[self._rank_of(request)].request_rows(request)

    def layers_of(self, request: int = 0) -> list[Layer]:
        """Layers that a request ran through, in order.

        In an encoder-decoder those of the encoder for the encoder's request; for the decoder's
        its own layers and cross attention.

        Raises
        ------
        InputError
            For a request the trace does not have.
        """
        return self._units[self._rank_of(request)].layers_of(request)

    def key_request(self, layer: int, request: int = 0) -> int:
        """The request whose tokens are a layer's keys: the encoder's in a cross layer.

        Raises
        ------
        InputError
            For a layer or request the trace does not have.
        """
        return self._units[self._rank_of(request)].key_request(layer, request)

    def layer_data(self, layer: int, request: int = 0) -> LayerData:
        """q, k, v, lse and received of one layer of one request, as float32."""
        return self._arrays[self._rank_of(request)].layer_data(layer, request)

    def attention_data(self, layer: int, request: int = 0, skipped: int = 0) -> LayerData:
        """q, k and lse of one layer of one request, as float32; v and received are not read.

        Of the first `skipped` rows whose query was kept, q is not read either and is zero.
        """
        return self._arrays[self._rank_of(request)].attention_data(layer, request, skipped)

    def row_array(self, kind: str, layer: int, request: int = 0) -> Float:
        """One kind of row array (`q_prerope`, say) of one layer, by position, as float32."""
        return self._arrays[self._rank_of(request)].row_array(kind, layer, request)

    def static(self, name: str, request: int | None = None) -> NDArray[Any]:
        """An array without a row axis, such as `wo [layer, hidden, q_head*head_dim]`.

        That of the rank which recorded `request`, by default of the first.
        """
        rank = next(iter(self._arrays)) if request is None else self._rank_of(request)
        return self._arrays[rank].static(name)

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
        return self._arrays[self._rank_of(request)].attention(layer, head, rows, keys, request)

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

    def clocks(self) -> dict[int, RankClock]:
        """How the times of each rank are put on the clock of the first."""
        notes = [store.table("clock_sync") for store in self._stores.values()]
        return rank_clocks(pa.concat_tables(notes), self.ranks)

    def state(self) -> database.State:
        """What is committed in all ranks, as far as this trace knows."""
        return database.State(self.path, self._stores)

    def places(self) -> RowPlaces:
        """Where rows stand in an array over all ranks, as many as they have now."""
        return RowPlaces({rank: unit.rows for rank, unit in self._units.items()})

    def replay_places(self, name: str) -> RowPlaces:
        """Where rows stand on axis 0 of a result's `evicted_at`."""
        store = self.replay(name)
        found = store.table("replay_ranks")
        # Older results are of the first rank, and do not say so.
        counts = dict(zip(found["rank"].to_pylist(), found["rows"].to_pylist(), strict=True))
        return RowPlaces(counts or {min(self._stores): store.rows})

    def _rank_of(self, request: int) -> int:
        rank = request // NUMBERS_PER_RANK
        if rank in self.shards:
            raise InputError(
                f"request {request} was asked for; rank {rank} of {self.path} holds other heads of"
                f" rank {self.shards[rank]}'s requests, and they are read as one; ask for request"
                f" {request - (rank - self.shards[rank]) * NUMBERS_PER_RANK}, or open the trace"
                f" with rank={rank}"
            )
        unit = self._units.get(rank)
        if unit is None or request not in unit.by_request:
            have = [number for one in self._units.values() for number in one.by_request]
            raise InputError(
                f"request {request} was not found in {self.path};"
                f" the trace has {', '.join(map(str, have[:8])) or 'none'}"
            )
        return rank

    def store(self, rank: int) -> StoreReader:
        """The folder of one rank: its tables and arrays, as they were written."""
        return self._stores[rank]

    def replay_directory(self) -> Path:
        """Where replay results of this trace belong."""
        return self.path / REPLAYS

    def whatif_directory(self) -> Path:
        """Where results about other memory than the recorded one belong, a folder each."""
        return self.path / WHATIFS


def open_trace(path: str | os.PathLike[str], rank: int | None = None) -> Trace:
    """Open a trace for reading, also while it is being recorded.

    Parameters
    ----------
    path : path-like
        The trace directory.
    rank : int, optional
        Read only what this process recorded; default: all.

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
