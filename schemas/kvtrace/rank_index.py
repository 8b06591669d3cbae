"""What one recording process wrote in tables: its layers, requests, tokens and rows."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.model import Layer, Request, number_text
from kvtrace.ranks import NUMBERS_PER_RANK
from kvtrace.sequences import Fork, rows_by_request
from kvtrace.store import StoreReader

Ids = NDArray[np.int64]


class RankIndex:
    """The tables of one rank, as they stood when each was first asked for.

    Parameters
    ----------
    path : pathlib.Path
        The trace, for what errors say.
    rank : int
        The rank's number.
    store : StoreReader
        Its folder.
    """

    def __init__(self, path: Path, rank: int, store: StoreReader) -> None:
        self.path = path
        self.rank = rank
        self.store = store
        #: Number of the rank's first row.
        self.first_row = rank * NUMBERS_PER_RANK

    @property
    def rows(self) -> int:
        """Tokens that the rank processed: length of axis 0 of its arrays."""
        return self.store.rows

    def table(self, name: str) -> pa.Table:
        """A whole table of schema.sql, as the rank wrote it."""
        return self.store.table(name)

    def index(self, rows: Ids) -> Ids:
        """Index of some rows on axis 0 of the rank's arrays."""
        return rows - self.first_row

    @cached_property
    def layers(self) -> list[Layer]:
        """Attention layers, in order."""
        found = [Layer(**row) for row in self.table("layers").to_pylist()]
        return sorted(found, key=lambda layer: (layer.model, layer.layer))

    @cached_property
    def selection(self) -> dict[str, Any]:
        """What was asked for: layers, heads, queries, max_bytes; empty where not said."""
        runs = self.table("runs").to_pylist()
        return dict(json.loads(runs[0]["selection"] or "{}")) if runs else {}

    def requests(self) -> list[Request]:
        """Sequences, in order of their start; only those with committed tokens."""
        counts = {request: len(rows) for request, rows in self.by_request.items()}
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
        """Tokens of a request of this rank by position: position, token_id, text, source."""
        rows = self.request_rows(request)
        names = ["position", "token_id", "text", "source"]
        found = self._tokens
        if not found["row"].null_count:
            return self._tokens_of_rows(found, rows).select(names)
        # Older traces do not say which row a token is.
        found = found.filter(pc.equal(found["request"], request)).sort_by("position")
        return found.select(names)

    def request_rows(self, request: int = 0) -> Ids:
        """Row of each position of a request of this rank: int64 [token]."""
        return self.by_request[request]

    def layers_of(self, request: int = 0) -> list[Layer]:
        """Layers that a request of this rank ran through, in order."""
        model = self.models[request]
        found = [spec for spec in self.layers if spec.model == model]
        if model not in self.paired_models:
            return found
        is_encoder = self.encoders[request] is None
        return [spec for spec in found if (spec.attention_kind == "bidirectional") == is_encoder]

    def key_request(self, layer: int, request: int = 0) -> int:
        """The request whose tokens are a layer's keys: the encoder's in a cross layer.

        Raises
        ------
        InputError
            For a layer the request does not have.
        """
        source = self.encoders[request] if self.layer(layer, request).is_cross else None
        return request if source is None else source

    def layer(self, layer: int, request: int) -> Layer:
        """The layer of a request by the model's number.

        Raises
        ------
        InputError
            For a layer the request does not have.
        """
        specs = {spec.layer: spec for spec in self.layers_of(request)}
        try:
            return specs[layer]
        except KeyError:
            have = number_text(list(specs)) or "none"
            raise InputError(
                f"layer {layer} was not found in request {request} of {self.path}; it has {have}"
            ) from None

    @cached_property
    def by_request(self) -> dict[int, Ids]:
        """Row of each position, of every request that has tokens."""
        found = self.table("rows")
        row, request, position = (
            found[name].to_numpy().astype(np.int64) for name in ("row", "request", "position")
        )
        forks = [Fork(**fork) for fork in self.table("forks").to_pylist()]
        return rows_by_request(row, request, position, forks)

    @cached_property
    def _tokens(self) -> pa.Table:
        return self.table("tokens")

    @cached_property
    def _token_order(self) -> Ids:
        """Rows of table `tokens` in the order of the rows that they are."""
        return np.argsort(self._tokens["row"].to_numpy())

    @cached_property
    def prompt_tokens(self) -> dict[int, int]:
        """Tokens of the prompt, by request."""
        found = self.table("requests")
        counts = found["prompt_tokens"].to_pylist()
        return dict(zip(found["request"].to_pylist(), counts, strict=True))

    @cached_property
    def forked_prompts(self) -> set[int]:
        """Requests that share rows of their prompt with others, or processed some again."""
        found: set[int] = set()
        for fork in self.table("forks").to_pylist():
            if fork["source"] != fork["request"]:
                found |= {fork["source"], fork["request"]}
            elif fork["tokens"] < self.prompt_tokens.get(fork["request"], 0):
                found.add(fork["request"])
        return found

    @cached_property
    def has_query(self) -> NDArray[np.bool_]:
        """[index]: whether the row's q and lse were kept."""
        found = self.table("rows")
        held = np.zeros(self.rows, bool)
        rows = self.index(found["row"].to_numpy())
        inside = rows < self.rows
        held[rows[inside]] = found["has_query"].to_numpy()[inside]
        return held

    @cached_property
    def encoders(self) -> dict[int, int | None]:
        """The request that each request's cross attention reads."""
        found = self.table("requests")
        sources = found["encoder_request"].to_pylist()
        return dict(zip(found["request"].to_pylist(), sources, strict=True))

    @property
    def paired_models(self) -> set[int]:
        """Encoder-decoders of which a decoder ran."""
        sources = self.encoders.items()
        return {self.models[request] for request, source in sources if source is not None}

    @cached_property
    def models(self) -> dict[int, int]:
        """The model that ran each request."""
        found = self.table("requests")
        return dict(zip(found["request"].to_pylist(), found["model"].to_pylist(), strict=True))

    def _tokens_of_rows(self, tokens: pa.Table, rows: Ids) -> pa.Table:
        row, order = tokens["row"].to_numpy(), self._token_order
        place = np.minimum(np.searchsorted(row, rows, sorter=order), max(len(row) - 1, 0))
        at = order[place] if len(row) else place
        missing = row[at] != rows if len(row) else np.ones(len(rows), bool)
        found = tokens.take(pa.array(at, mask=missing))
        positions = pa.array(np.arange(len(rows)), found.schema.field("position").type)
        return found.set_column(found.schema.get_field_index("position"), "position", positions)
