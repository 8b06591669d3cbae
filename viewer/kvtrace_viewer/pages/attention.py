"""Attention maps: the wall of all heads, one zoomable map, and the keys that stand out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, dcc, html

from kvtrace.marks import HEAVY_FACTOR, SINK_DISTANCE, SINK_SHARE
from kvtrace.model import Request
from kvtrace.trace import Trace
from kvtrace_viewer.components import (
    Component,
    button,
    empty_state,
    field,
    icon_button,
    panel,
    segmented,
    select,
    status_line,
)
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.tiles import rows_read_per_thumb_cell, thumb_cells
from kvtrace_viewer.pages.common import (
    choose_request,
    numbered,
    one_of,
    place_of,
    request_options,
    with_trace,
)

PATH = "/attention"
NAME = "Attention"
SCALES = (("linear", "Linear"), ("sqrt", "Square root"), ("log", "Log"))
POOLS = (("max", "Max"), ("mean", "Mean"))

MARK_RULES = (
    f"Sink: mean attention of at least {SINK_SHARE:g} from the queries more than {SINK_DISTANCE} "
    "tokens later (a quarter of a request under 256 tokens). Heavy hitter: not a sink, and "
    f"received at least {HEAVY_FACTOR:g} times what uniform attention would give it."
)


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "attention",
        path=PATH,
        name=NAME,
        order=order,
        title="Attention · kvtrace",
        layout=partial(layout, context),
    )
    app.clientside_callback(
        dash.ClientsideFunction("attention", "update"),
        Output("attention-status", "title"),
        Input("attention-config", "data"),
        Input("attention-request", "value"),
        Input("attention-layer", "value"),
        Input("attention-head", "value"),
        Input("attention-scale", "value"),
        Input("attention-pool", "value"),
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and view of the URL."""
    body = with_trace(context, trace, lambda found, opened: build(found, opened, query))
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace that has tokens."""
    if not {"q", "k", "lse"} <= set(trace.table("array_catalog")["kind"].to_pylist()):
        return empty_state(
            "No attention in this trace",
            f"{trace.name} was recorded without queries and keys, from which maps are computed.",
            "kvtrace record --detail qkv --out run.kvtrace -- script.py",
        )
    requests = trace.requests()
    request = choose_request(requests, query.get("request"))
    layers = trace.layers_of(request.request)
    head_numbers = max((layer.q_head_numbers for layer in layers), key=len, default=[])
    config = {
        "trace": trace_id,
        "status": trace.status,
        "requests": {
            str(one.request): {
                "tokens": one.tokens,
                "thumb_cells": thumb_cells(one.tokens),
                "thumb_rows": rows_read_per_thumb_cell(one.tokens),
                "missing": missing_queries(trace, one),
                "layers": [
                    {
                        "layer": layer.layer,
                        "heads": layer.num_q_heads,
                        "head_numbers": layer.q_head_numbers,
                        "kv_heads": layer.num_kv_heads,
                        "causal": layer.attention_kind in ("full", "sliding"),
                        "window": layer.sliding_window,
                        # Whose tokens the keys are: in cross attention the encoder's.
                        "keys_of": trace.key_request(layer.layer, one.request),
                        "name": layer.name,
                    }
                    for layer in trace.layers_of(one.request)
                ],
            }
            for one in requests
        },
        "view": {name: query.get(name) for name in ("x", "y", "span")},
    }
    layer_index = place_of(query.get("layer"), [layer.layer for layer in layers])
    head = place_of(query.get("head"), head_numbers)
    return [
        toolbar(
            requests,
            str(request.request),
            [layer.layer for layer in layers],
            head_numbers,
            layer_index,
            head,
            query,
        ),
        status_line("attention-status"),
        html.Div([heads(), map_panel(), pointer()], className="kv-attention"),
        dcc.Store(id="attention-config", data=config),
    ]


def missing_queries(trace: Trace, request: Request) -> str:
    """What to say of a request whose rows are not all there; empty where they are."""
    held = trace.holdings(request.request)
    missing = int((~held.queries).sum())
    if not missing:
        return ""
    return (
        f"{missing:,} of {request.tokens:,} queries were not kept (of the prompt's: "
        f"{held.query_text}): their rows stay empty, and marks are told by the others."
    )


def toolbar(
    requests: Sequence[Request],
    request: str,
    layer_numbers: list[int],
    head_numbers: list[int],
    layer: int,
    head: int,
    query: dict[str, str],
) -> Component:
    """The choices of the page."""
    scale = one_of(query.get("scale"), tuple(name for name, _ in SCALES), "sqrt")
    pool = one_of(query.get("pool"), tuple(name for name, _ in POOLS), "max")
    return html.Div(
        [
            field(
                "Request",
                select("attention-request", request_options(requests), request, 190, "Request"),
            ),
            field(
                "Layer",
                select("attention-layer", numbered(layer_numbers), str(layer), 76, "Layer"),
            ),
            field(
                "Head",
                select("attention-head", numbered(head_numbers), str(head), 76, "Query head"),
            ),
            field("Colour", segmented("attention-scale", SCALES, scale)),
            field(
                "Shrink by",
                dmc.Tooltip(
                    segmented("attention-pool", POOLS, pool),
                    label="What a cell shows when it covers several pairs",
                    openDelay=500,
                ),
            ),
            html.Div(className="kv-spacer"),
            html.Div(
                [
                    button("attention-png", "PNG", "Save the map as a picture"),
                    button("attention-csv", "CSV", "Save the weights of the window as text"),
                    button("attention-npz", "NPZ", "Save the weights of the window for NumPy"),
                ],
                className="kv-button-group",
            ),
        ],
        className="kv-toolbar",
    )


def heads() -> Component:
    """Thumbnails of all heads, and the keys that stand out in the chosen one."""
    canvas = html.Canvas(
        id="attention-wall",
        tabIndex=0,
        **{"aria-label": "All heads; arrow keys move the selection"},
    )
    note = html.P(id="attention-wall-note", className="kv-note")
    wall = panel(
        "Layers by heads",
        [html.Div(canvas, className="kv-wall-scroll"), note],
        class_name="kv-wall",
    )
    marks = panel(
        "Sinks and heavy hitters",
        html.Div(id="attention-marks", className="kv-marks"),
        aside=dmc.Tooltip(
            html.Span("?", className="kv-info", tabIndex=0),
            label=MARK_RULES,
            multiline=True,
            w=300,
            events={"hover": True, "focus": True, "touch": True},
        ),
        class_name="kv-grow",
    )
    return html.Div([wall, marks], className="kv-side")


def map_panel() -> Component:
    """The zoomable map."""
    zoom = html.Div(
        [
            icon_button("attention-out", "minus", "Zoom out (-)"),
            icon_button("attention-in", "plus", "Zoom in (+)"),
            button("attention-fit", "Fit", "Show the whole map (0 or double click)"),
        ],
        className="kv-button-group",
    )
    body = html.Div(
        [
            html.Canvas(
                id="attention-map",
                tabIndex=0,
                **{"aria-label": "Attention map: wheel zooms, dragging pans, arrow keys pan"},
            ),
            html.Canvas(id="attention-over"),
            html.Div(id="attention-tip", className="kv-tip"),
        ],
        id="attention-stage",
        className="kv-stage",
    )
    return panel("Map", body, aside=[html.Span(id="attention-caption"), zoom], class_name="kv-map")


def pointer() -> Component:
    """What is under the pointer."""
    return panel(
        "Query and key",
        html.Div(id="attention-readout", className="kv-readout"),
        class_name="kv-pointer",
    )
