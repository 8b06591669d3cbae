"""The pool of a paged cache as a grid of blocks, step by step, beside what other pools would do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, dcc, html

from kvtrace.trace import Trace
from kvtrace_viewer.allocation.pool import POLICIES
from kvtrace_viewer.allocation.settings import ADMISSIONS, PREEMPTIONS
from kvtrace_viewer.components import (
    Component,
    button,
    empty_state,
    field,
    panel,
    segmented,
    status_line,
    transport,
    work_line,
)
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.pools import pool_runs
from kvtrace_viewer.grids import grid, number_column, text_column
from kvtrace_viewer.pages.common import one_of, with_trace

PATH = "/blocks"
NAME = "Blocks"
MAX_CARDS = 3
SPEEDS = ("1", "4", "16", "64")
COLOURS = (("request", "Request"), ("use", "Use"))
#: Fields of the form, in the order in which the browser takes them.
FORM = ("pool", "block_size", "max_batch", "admission", "policy", "preempt")
SHARE = {"function": "kvShare(params.value)"}
COLUMNS = [
    text_column("label", "Pool", minWidth=220, flex=1, tooltipField="settings"),
    number_column("steps", "Steps", width=84),
    number_column("preemptions", "Preempted", width=104),
    number_column("refused", "Refused", width=92),
    number_column("wait_steps_mean", "Waited, steps", width=118, valueFormatter=SHARE),
    number_column("wait_steps_p95", "p95", width=76, valueFormatter=SHARE),
    number_column("preempted_steps_mean", "Preempted for", width=122, valueFormatter=SHARE),
    number_column("mean_occupancy", "Held, mean", width=106, valueFormatter=SHARE),
    number_column("peak_blocks", "Peak", width=84),
    number_column("internal_fragmentation", "Unused slots", width=114, valueFormatter=SHARE),
    number_column("evictions", "Evicted", width=92),
    number_column("tokens_per_s", "Tokens/s", width=96, valueFormatter=SHARE),
    number_column("cached_tokens", "Found cached", width=116),
    number_column("recomputed_tokens", "Recomputed", width=110),
]


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "blocks",
        path=PATH,
        name=NAME,
        order=order,
        title="Blocks · kvtrace",
        layout=partial(layout, context),
    )
    app.clientside_callback(
        dash.ClientsideFunction("blocks", "update"),
        Output("blocks-status", "title"),
        Input("blocks-config", "data"),
        Input("blocks-chosen", "value"),
        Input("blocks-colour", "value"),
        Input("blocks-speed", "value"),
    )
    app.clientside_callback(
        dash.ClientsideFunction("blocks", "form"),
        Output("blocks-run-status", "title"),
        *(Input(f"blocks-{name}", "value") for name in FORM),
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and view of the URL."""
    body = with_trace(
        context, trace, lambda found, opened: build(found, opened, query), needs_tokens=False
    )
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace with blocks, or with requests to simulate blocks for."""
    rows = pool_runs(trace)
    if not rows and not trace.requests():
        return empty_state(
            "No blocks",
            f"{trace.name} holds no event of a block and no recorded request. Record continuous "
            "batching, whose cache is made of blocks (of imported workloads kvtrace blocks asks "
            "what a cache would have hit):",
            "kvtrace record -- transformers serve --continuous-batching --no-cb-use-cuda-graph",
        )
    known = [row["allocation_run"] for row in rows]
    asked = (query.get("runs") or "").split(" ")
    chosen = [run for run in asked if run in known][:MAX_CARDS] or known[:1]
    config = {"trace": trace_id, "time": query.get("t"), "known": known}
    chooser = dmc.MultiSelect(
        id="blocks-chosen",
        data=[{"value": row["allocation_run"], "label": row["label"]} for row in rows],
        value=chosen,
        size="xs",
        searchable=True,
        maxValues=MAX_CARDS,
        className="kv-replay-chosen",
        placeholder="" if chosen else "Simulate a pool below",
        comboboxProps={"shadow": "md"},
    )
    colour = one_of(query.get("colour"), ("request", "use"), "request")
    return [
        dcc.Store(id="blocks-config", data=config),
        html.Div(
            [
                field("Pools", chooser),
                field("Colours", segmented("blocks-colour", COLOURS, colour)),
            ],
            className="kv-toolbar",
        ),
        status_line("blocks-status"),
        player(one_of(query.get("speed"), SPEEDS, "4")),
        table(rows),
        runner(query),
    ]


def player(speed: str) -> Component:
    """Transport controls, a grid and the lanes of each pool."""
    return panel(
        "The pool",
        [
            transport("blocks", "step", SPEEDS, speed),
            html.Div(id="blocks-cards", className="kv-pools"),
            html.Div(id="blocks-tip", className="kv-tip"),
        ],
        aside=html.Div(id="blocks-legend", className="kv-legend"),
        class_name="kv-player",
    )


def table(rows: list[dict[str, Any]]) -> Component:
    """What each pool came to."""
    rows_grid = grid(
        "blocks-grid",
        COLUMNS,
        "No pool yet: simulate one below",
        rowData=rows,
        getRowId="params.data.allocation_run",
    )
    return panel("Results", rows_grid, class_name="kv-flush")


def runner(query: dict[str, str]) -> Component:
    """The form that serves the same requests from other pools, as the URL has it."""
    given = {name: (query.get(name) or "").split() for name in FORM}
    numbers = (
        ("pool", "Blocks of the pool", "64 128"),
        ("block_size", "Tokens of a block", "8 16"),
        ("max_batch", "Largest batch", "8"),
    )
    names = (
        ("admission", "Admission", ADMISSIONS),
        ("policy", "Policy", POLICIES),
        ("preempt", "Preemption", PREEMPTIONS),
    )
    form = html.Div(
        [
            *(field(label, _tags(name, hint, given[name])) for name, label, hint in numbers),
            *(field(label, _choices(name, known, given[name])) for name, label, known in names),
            button("blocks-run", "Simulate", "Serve the same requests from it", "kv-primary"),
        ],
        className="kv-toolbar kv-runner",
    )
    note = html.P(
        "What is left empty stays as recorded; of several values every combination is simulated.",
        className="kv-note",
    )
    return panel("Other pools", [form, *work_line("blocks-run"), note])


def _tags(name: str, hint: str, given: list[str]) -> Component:
    return dmc.TagsInput(
        id=f"blocks-{name}",
        value=[text for text in given if text.isdecimal()],
        size="xs",
        splitChars=[" ", ","],
        placeholder=hint,
        className="kv-budgets-input",
        acceptValueOnBlur=True,
    )


def _choices(name: str, known: Mapping[str, str], given: list[str]) -> Component:
    return dmc.MultiSelect(
        id=f"blocks-{name}",
        data=[{"value": value, "label": value} for value in known],
        value=[text for text in given if text in known],
        size="xs",
        placeholder="as recorded",
        className="kv-budgets-input",
        comboboxProps={"shadow": "md"},
    )
