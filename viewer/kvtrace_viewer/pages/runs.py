"""The list of traces."""

from __future__ import annotations

from functools import partial
from typing import Any

import dash
from dash import Input, Output, dcc, html

from kvtrace_viewer.components import Component, status_line
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.summary import summaries
from kvtrace_viewer.grids import grid, number_column, text_column
from kvtrace_viewer.pages.common import no_traces

PATH = "/"
NAME = "Runs"
REFRESH_MS = 5000

COLUMNS = [
    text_column("name", "Trace", flex=2, minWidth=180, cellRenderer="KvTraceLink", pinned="left"),
    text_column("status", "Status", width=125, cellRenderer="KvStatus"),
    text_column("model", "Model", flex=2, minWidth=150, tooltipField="model"),
    text_column("source", "Source", width=95),
    number_column("layers", "Layers", width=80),
    text_column("heads", "Q / KV heads", width=115, type="rightAligned"),
    number_column("requests", "Requests", width=95),
    number_column("tokens", "Tokens", width=90),
    number_column("rows", "Rows", width=80),
    number_column("bytes", "Size", width=95, valueFormatter={"function": "kvBytes(params.value)"}),
    number_column("replays", "Replays", width=85),
    text_column("recorded", "Recorded", width=160),
]


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "runs",
        path=PATH,
        name=NAME,
        order=order,
        title="Runs · kvtrace",
        layout=partial(layout, context),
    )
    app.callback(
        Output("runs-grid", "rowData"),
        Input("runs-refresh", "n_intervals"),
        prevent_initial_call=True,
    )(lambda _count: summaries(context.library))
    app.clientside_callback(
        dash.ClientsideFunction("runs", "open"),
        Output("runs-status", "title"),
        Input("runs-grid", "cellClicked"),
        prevent_initial_call=True,
    )


def layout(context: Context, **_query: str) -> Component:
    """Build the page."""
    rows = summaries(context.library)
    if not rows:
        return html.Div(no_traces(context.library), className="kv-page")
    rows_grid = grid("runs-grid", COLUMNS, rowData=rows, getRowId="params.data.id")
    count = f"{len(rows)} trace{'' if len(rows) == 1 else 's'}"
    return html.Div(
        [
            html.Div(
                [html.H1("Runs"), html.Span(f"{count} under {context.library.root}")],
                className="kv-title",
            ),
            panel_of(rows_grid),
            status_line("runs-status"),
            dcc.Interval(id="runs-refresh", interval=REFRESH_MS),
        ],
        className="kv-page",
    )


def panel_of(rows_grid: Component) -> Component:
    """The grid in its box."""
    return html.Section(rows_grid, className="kv-panel kv-panel-flush")
