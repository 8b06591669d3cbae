"""Attention maps: tiles, thumbnails, single rows, marks, and exports of what is shown."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import Response
from numpy.typing import NDArray

from kvtrace import attention
from kvtrace.errors import InputError
from kvtrace.head_map import HeadMap
from kvtrace.trace import Trace
from kvtrace_viewer.api.downloads import csv_response, file_response
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived import tiles
from kvtrace_viewer.derived.encode import SCALES
from kvtrace_viewer.derived.identity import identity
from kvtrace_viewer.derived.tokens import token_texts

MAX_LEVEL = 24
MAX_EXPORT_WEIGHTS = {"csv": 1_000_000, "npz": 25_000_000}

Index = Annotated[int, Query(ge=0, le=2**31 - 1)]
# Times the 2^32 positions of a tile of the last level, still an int64.
TileIndex = Annotated[int, Query(ge=0, le=2**24)]


def router(context: Context) -> APIRouter:
    """Routes over the attention maps of a trace."""
    routes = APIRouter()

    @routes.get("/tile")
    def tile(
        trace: str,
        layer: Index,
        head: Index,
        level: Annotated[int, Query(ge=0, le=MAX_LEVEL)],
        row: TileIndex,
        column: TileIndex,
        request: Index = 0,
        scale: str = "sqrt",
    ) -> Response:
        check_scale(scale)
        opened = context.library.open(trace)
        place = (level, row, column, scale)
        key = ("tile", identity(opened), request, layer, head, *place)
        return _binary(
            context.tiles.get(
                key,
                lambda: tiles.tile(context.layers.head_map(opened, request, layer, head), *place),
            )
        )

    @routes.get("/thumbnails")
    def thumbnails(trace: str, layer: Index, request: Index = 0, scale: str = "sqrt") -> Response:
        check_scale(scale)
        opened = context.library.open(trace)
        key = ("thumbnails", identity(opened), request, layer, scale)
        heads = context.layers.head_maps(opened, request, layer)
        return _binary(
            context.tiles.get(key, lambda: b"".join(tiles.thumbnail(head, scale) for head in heads))
        )

    @routes.get("/row")
    def row(trace: str, layer: Index, head: Index, row: Index, request: Index = 0) -> Response:
        opened = context.library.open(trace)
        source = context.layers.head_map(opened, request, layer, head)
        if row >= source.num_tokens:
            raise InputError(
                f"no query {row} in request {request}; it has {source.num_tokens} tokens, "
                "counted from 0"
            )
        weights = source.block(np.array([row], np.int64), 0, source.num_keys)[0]
        # Hidden keys have no weight; of a query that was not kept none is known.
        known = np.nan_to_num(weights) if source.has_query(row) else np.full_like(weights, np.nan)
        return _binary(known.tobytes())

    @routes.get("/marks")
    def marks(trace: str, layer: Index, head: Index, request: Index = 0) -> list[dict[str, Any]]:
        opened = context.library.open(trace)
        found = context.head_marks(opened, request, layer, head)
        return [vars(mark) for mark in found]

    @routes.get("/export")
    def export(
        trace: str,
        layer: Index,
        head: Index,
        row_start: Index,
        row_stop: Index,
        key_start: Index,
        key_stop: Index,
        request: Index = 0,
        kind: str = "csv",
    ) -> Response:
        opened = context.library.open(trace)
        source = context.layers.head_map(opened, request, layer, head)
        window = Window(source, row_start, row_stop, key_start, key_stop)
        check_export(kind, window)
        name = f"{opened.name}-request{request}-layer{layer}-head{head}.{kind}"
        if kind == "csv":
            return csv_response(csv_rows(opened, request, layer, head, window), name)
        content = to_npz(opened, request, layer, head, window)
        return file_response(content, name, "application/octet-stream")

    return routes


class Window:
    """A stretch of a map, cut to what the map has."""

    def __init__(
        self, source: HeadMap, row_start: int, row_stop: int, key_start: int, key_stop: int
    ) -> None:
        rows, keys = source.num_tokens, source.num_keys
        self.rows = np.arange(min(row_start, rows), min(row_stop, rows), dtype=np.int64)
        self.keys = np.arange(min(key_start, keys), min(key_stop, keys), dtype=np.int64)

    @property
    def size(self) -> int:
        """Weights in the window."""
        return self.rows.size * self.keys.size


def check_scale(scale: str) -> None:
    """Refuse a colour scale that does not exist."""
    if scale not in SCALES:
        raise InputError(f"no scale {scale!r}; expected one of {', '.join(SCALES)}; choose one")


def check_export(kind: str, window: Window) -> None:
    """Refuse an export of another kind, of nothing, or past what a browser should be sent."""
    limit = MAX_EXPORT_WEIGHTS.get(kind)
    if limit is None:
        raise InputError(f"no export {kind!r}; expected csv or npz; choose one")
    if window.size == 0:
        raise InputError("the window holds no weights; expected rows and keys; zoom out")
    if window.size > limit:
        raise InputError(
            f"the window holds {window.size:,} weights; {kind} takes up to {limit:,}; "
            "zoom in, or use Trace.attention in Python"
        )


def csv_rows(
    trace: Trace, request: int, layer: int, head: int, window: Window
) -> Iterator[list[Any]]:
    """Long form: query, its text, key, its text, weight; pairs that are not visible left out."""
    texts = token_texts(trace, request)
    key_texts = token_texts(trace, trace.key_request(layer, request))
    weights = _weights(trace, request, layer, head, window)
    spec = next(spec for spec in trace.layers_of(request) if spec.layer == layer)
    yield ["query", "query_text", "key", "key_text", "weight"]
    for row, column in np.argwhere(attention.visible(window.rows, window.keys, spec)):
        query, key = window.rows[row], window.keys[column]
        yield [query, texts[query], key, key_texts[key], f"{weights[row, column]:.9g}"]


def to_npz(trace: Trace, request: int, layer: int, head: int, window: Window) -> bytes:
    """Arrays weights [row, key] float32, rows, keys (positions) and their token texts."""
    texts = np.array(token_texts(trace, request))
    key_texts = np.array(token_texts(trace, trace.key_request(layer, request)))
    out = io.BytesIO()
    np.savez_compressed(
        out,
        weights=_weights(trace, request, layer, head, window),
        rows=window.rows,
        keys=window.keys,
        row_text=texts[window.rows],
        key_text=key_texts[window.keys],
    )
    return out.getvalue()


def _weights(
    trace: Trace, request: int, layer: int, head: int, window: Window
) -> NDArray[np.float32]:
    return trace.attention(layer, head, rows=window.rows, keys=window.keys, request=request)


def _binary(content: bytes) -> Response:
    # The browser keeps its own copies; a trace may be recorded again under the same name.
    return Response(
        content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"}
    )
