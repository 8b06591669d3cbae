"""Memory tiers: who lies where over time, what crosses the links, and who waits."""

from __future__ import annotations

from functools import partial
from typing import Any

import dash
from dash import Input, Output, dcc, html

from kvtrace.trace import Trace
from kvtrace_viewer.components import (
    Component,
    button,
    empty_state,
    field,
    panel,
    segmented,
    select,
    status_line,
    work_line,
)
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.results import replay_rows
from kvtrace_viewer.derived.tiers import tier_runs
from kvtrace_viewer.figures.graph import graph
from kvtrace_viewer.figures.theme import base_layout
from kvtrace_viewer.grids import grid, number_column, text_column
from kvtrace_viewer.pages.common import one_of, request_options, with_trace
from kvtrace_viewer.pages.replay import in_order, replay_options
from kvtrace_viewer.tiers.hardware import Hardware, read_hardware, shipped
from kvtrace_viewer.tiers.options import LOADS, MODES
from kvtrace_viewer.tiers.order import ORDERS

PATH = "/tiers"
NAME = "Tiers"
MACHINE = "h100"
#: Value of the choice between whole blocks and the replays.
BLOCKS = "blocks"

#: Requests that decode at once.
BATCHES = [
    {"value": "0", "label": "Prompts alone"},
    *({"value": str(n), "label": f"{n} at once"} for n in (1, 8, 32, 64, 128, 256)),
]

#: What the form has where the URL says nothing.
USUAL = {
    "machine": MACHINE,
    "place": BLOCKS,
    "policy": "lru",
    "mode": "evict",
    "load": "cheaper",
    "overlap": "yes",
    "prefetch": "no",
    "batch": "0",
}

BYTES = {"function": "kvBytes(params.value)"}
COLUMNS = [
    text_column("name", "Tier", width=110, tooltipField="source"),
    number_column("capacity_bytes", "Room for the cache", width=150, valueFormatter=BYTES),
    number_column("hits", "Hits", width=100),
    number_column("bytes_up", "Moved up", width=110, valueFormatter=BYTES),
    number_column("bytes_down", "Moved down", width=110, valueFormatter=BYTES),
    number_column("peak_bytes", "Peak", width=110, valueFormatter=BYTES),
    number_column("mean_bytes", "Mean", width=110, valueFormatter=BYTES),
    number_column(
        "cost_per_hour", "$ / hour", width=100, valueFormatter={"function": "kvShare(params.value)"}
    ),
    text_column("source", "Figures from", flex=1, minWidth=180, tooltipField="source"),
]


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "tiers",
        path=PATH,
        name=NAME,
        order=order,
        title="Tiers · kvtrace",
        layout=partial(layout, context),
    )
    app.clientside_callback(
        dash.ClientsideFunction("tiers", "update"),
        Output("tiers-status", "title"),
        Input("tiers-config", "data"),
        Input("tiers-run", "value"),
        Input("tiers-request", "value"),
    )
    app.clientside_callback(
        dash.ClientsideFunction("tiers", "form"),
        Output("tiers-start-status", "title"),
        Input("tiers-config", "data"),
        *(Input(f"tiers-{name}", "value") for name in USUAL),
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and view of the URL."""
    body = with_trace(
        context, trace, lambda found, opened: build(found, opened, query), needs_tokens=False
    )
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace with something to serve."""
    if not any(trace.table(name).num_rows for name in ("block_accesses", "tokens", "kv_events")):
        return empty_state(
            "Nothing to serve",
            f"{trace.name} holds no tokens, no imported workload and no KV events: there is no "
            "block that somebody asked for.",
            "kvtrace import mooncake FILE --out workload.kvtrace",
        )
    runs = tier_runs(trace)
    known = tuple(row["tier_run"] for row in runs)
    requests = trace.requests() if trace.rows else []
    numbers = tuple(str(one.request) for one in requests) or ("",)
    config = {
        "trace": trace_id,
        "form": {name: query.get(name) for name in ("machine", "figures")} | {"usual": USUAL},
        "view": {name: query.get(name) for name in ("first", "count")},
        "machines": {name: _figures(read_hardware(name)) for name in shipped()},
    }
    chosen = one_of(query.get("run"), known, known[0]) if known else None
    request = one_of(query.get("request"), numbers, numbers[0])
    return [
        dcc.Store(id="tiers-config", data=config),
        html.Div(
            [
                field("Run", select("tiers-run", run_options(runs), chosen, 420, "Run")),
                html.Div(
                    field(
                        "Request",
                        select("tiers-request", request_options(requests), request, 190, "Request"),
                    ),
                    id="tiers-request-field",
                ),
                field("Shown", html.Div(id="tiers-window", className="kv-tiers-window")),
                button("tiers-all", "All", "Show all blocks"),
            ],
            className="kv-toolbar",
        ),
        # Above what loads, which would push its button away under the pointer.
        runner(trace, query),
        status_line("tiers-status"),
        html.Div(results(), id="tiers-results", hidden=chosen is None),
    ]


def results() -> list[Component]:
    """What is shown of a run; hidden while there is none."""
    return [
        panel(
            "Who lies where",
            html.Div(
                [html.Canvas(id="tiers-map"), html.Div(id="tiers-tip", className="kv-tip")],
                className="kv-tiers-map",
                id="tiers-map-box",
            ),
            aside=html.Div(id="tiers-legend", className="kv-legend"),
        ),
        html.Div(
            [
                _figure("Held", "tiers-occupancy"),
                _figure("Moved", "tiers-traffic"),
                _figure("Computing and waiting", "tiers-waiting"),
            ],
            className="kv-tiers-figures",
        ),
        table(),
    ]


def run_options(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored runs for the drop-down, by what was placed."""
    words = {"blocks": "Whole blocks", "tokens": "Tokens by a replay"}
    groups: dict[str, list[dict[str, str]]] = {}
    for row in runs:
        groups.setdefault(words[row["kind"]], []).append(
            {"value": row["tier_run"], "label": row["tier_run"]}
        )
    return [{"group": group, "items": items} for group, items in groups.items()]


def _figures(hardware: Hardware) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "capacity": one.capacity, "read": one.read, "write": one.write}
        for one in hardware.tiers
    ]


def _figure(title: str, graph_id: str) -> Component:
    empty = {"data": [], "layout": base_layout("light")}
    return panel(title, html.Div(graph(graph_id, empty, "kv-graph"), className="kv-graph-box"))


def table() -> Component:
    """The tiers of the run, one a row."""
    rows_grid = grid(
        "tiers-grid",
        COLUMNS,
        "No run yet: start one above",
    )
    return panel(
        "Tiers",
        rows_grid,
        aside=html.Span(id="tiers-summary", className="kv-note"),
        class_name="kv-flush",
    )


def runner(trace: Trace, query: dict[str, str]) -> Component:
    """The form that serves the workload from other memory, as the URL has it."""
    machines = [{"value": name, "label": text} for name, text in shipped().items()]
    replays = replay_options(in_order(replay_rows(trace)))
    places = [{"group": "Everything", "items": [{"value": BLOCKS, "label": "Whole blocks"}]}]
    yes_no = (("yes", "Yes"), ("no", "No"))
    known: dict[str, list[Any]] = {
        "machine": machines,
        "place": [*places, *replays],
        "policy": list(ORDERS),
        "mode": list(MODES),
        "load": list(LOADS),
        "batch": BATCHES,
    }
    chosen = {
        name: one_of(query.get(name), _values(known.get(name, ["yes", "no"])), usual)
        for name, usual in USUAL.items()
    }
    shown = (
        ("machine", "Machine", 330),
        ("place", "What moves", 250),
        ("policy", "Gives up", 130),
        ("mode", "Moves down", 130),
        ("load", "Loads", 110),
        ("batch", "Decodes", 150),
    )
    form = html.Div(
        [
            *(
                field(label, select(f"tiers-{name}", known[name], chosen[name], width, label))
                for name, label, width in shown
            ),
            field("Overlap", segmented("tiers-overlap", yes_no, chosen["overlap"])),
            field("Prefetch", segmented("tiers-prefetch", yes_no, chosen["prefetch"])),
        ],
        className="kv-toolbar",
    )
    figures = html.Div(id="tiers-figures", className="kv-tiers-inputs")
    start = button("tiers-start", "Serve", "Compute and keep this run", "kv-primary")
    return panel("Other memory", [form, figures, start, *work_line("tiers-start")])


def _values(options: list[Any]) -> tuple[str, ...]:
    """Values of a drop-down, grouped or not."""
    found: list[str] = []
    for option in options:
        if isinstance(option, str):
            found.append(option)
        elif "items" in option:
            found += _values(option["items"])
        else:
            found.append(option["value"])
    return tuple(found)
