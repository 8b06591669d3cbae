"""Eviction policies side by side on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, dcc, html

from kvtrace.cached import cached_layers, cached_requests
from kvtrace.trace import Trace
from kvtrace_viewer.components import (
    Component,
    button,
    field,
    panel,
    segmented,
    select,
    status_line,
    transport,
    work_line,
)
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.policies import PolicyHelp, policy_help
from kvtrace_viewer.derived.results import replay_rows
from kvtrace_viewer.figures.budget_curve import budget_curve
from kvtrace_viewer.figures.graph import graph
from kvtrace_viewer.figures.retained_mass import retained_mass
from kvtrace_viewer.grids import grid, number_column, text_column
from kvtrace_viewer.pages.common import (
    choose_request,
    one_of,
    request_options,
    with_trace,
)
from kvtrace_viewer.replay.replayable import layers_replayed

PATH = "/replay"
NAME = "Replay"
MAX_CARDS = 6
PREFERRED_BUDGET = "25%"
SPEEDS = ("1", "4", "16", "64")
WHENS = (
    ("default", "Paper's"),
    ("prefill", "After prompt"),
    ("step", "Every step"),
    ("stream", "Stream"),
    ("chunk", "Prefill chunks"),
)

SHARE = {"function": "kvShare(params.value)"}
COLUMNS = [
    text_column("policy", "Policy", minWidth=150, flex=1, tooltipField="replay"),
    text_column("budget", "Budget", width=82, type="rightAligned"),
    text_column("decide_when", "When", width=84),
    text_column("exactness", "Exactness", width=98),
    number_column("retained_mass", "Retained mass", width=122, valueFormatter=SHARE),
    number_column("mass_p5", "p5", width=80, valueFormatter=SHARE),
    number_column("own_bound", "Bound", width=80, valueFormatter=SHARE),
    number_column("hits", "Hits", width=92),
    number_column("misses", "Misses", width=92),
    number_column("evictions", "Evictions", width=98),
    text_column(
        "retained_sinks",
        "Sinks kept",
        width=100,
        type="rightAligned",
        valueGetter={"function": "kvSinks(params.data)"},
    ),
    number_column("output_error", "Output error", width=112, valueFormatter=SHARE),
    number_column("kl", "KL, measured", width=116, valueFormatter=SHARE),
    number_column("agreement", "Top-1", width=80, valueFormatter=SHARE),
    number_column("ties", "Ties", width=78),
    number_column("overlap", "Overlap", width=92, valueFormatter=SHARE),
]


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "replay",
        path=PATH,
        name=NAME,
        order=order,
        title="Replay · kvtrace",
        layout=partial(layout, context),
    )
    app.clientside_callback(
        dash.ClientsideFunction("replay", "update"),
        Output("replay-status", "title"),
        Input("replay-config", "data"),
        Input("replay-request", "value"),
        Input("replay-layer", "value"),
        Input("replay-head", "value"),
        Input("replay-chosen", "value"),
        Input("replay-speed", "value"),
    )
    app.clientside_callback(
        dash.ClientsideFunction("replay", "form"),
        Output("replay-run-status", "title"),
        Input("replay-policies", "value"),
        Input("replay-budgets", "value"),
        Input("replay-when", "value"),
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and view of the URL."""
    body = with_trace(context, trace, lambda found, opened: build(found, opened, query))
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace that has tokens."""
    replayed = set(cached_requests(trace))
    requests = [one for one in trace.requests() if one.request in replayed]
    request = choose_request(requests, query.get("request"))
    replayed_layers = set(layers_replayed(trace, list(replayed)))
    layers = [
        layer for layer in cached_layers(trace, [request.request]) if layer.layer in replayed_layers
    ]
    numbers = tuple(str(layer.layer) for layer in layers) or ("0",)
    heads = max((layer.kv_head_numbers for layer in layers), key=len, default=[0])
    head_numbers = tuple(map(str, heads))
    rows = in_order(replay_rows(trace))
    chosen = chosen_replays(rows, query.get("replays"))
    config = {
        "trace": trace_id,
        "labels": {row["replay"]: row for row in rows},
        "requests": {
            str(one.request): {"tokens": one.tokens, "prompt_tokens": one.prompt_tokens}
            for one in requests
        },
        "time": query.get("t"),
    }
    return [
        dcc.Store(id="replay-config", data=config),
        html.Div(
            [
                field(
                    "Request",
                    select(
                        "replay-request",
                        request_options(requests),
                        str(request.request),
                        190,
                        "Request",
                    ),
                ),
                field(
                    "Layer",
                    select(
                        "replay-layer",
                        list(numbers),
                        one_of(query.get("layer"), numbers, numbers[0]),
                        76,
                        "Layer",
                    ),
                ),
                field(
                    "KV head",
                    select(
                        "replay-head",
                        list(head_numbers),
                        one_of(query.get("head"), head_numbers, head_numbers[0]),
                        76,
                        "KV head",
                    ),
                ),
                field(
                    "Replays",
                    dmc.MultiSelect(
                        id="replay-chosen",
                        data=replay_options(rows),
                        value=chosen,
                        size="xs",
                        searchable=True,
                        maxValues=MAX_CARDS,
                        className="kv-replay-chosen",
                        placeholder="" if chosen else "Choose up to six",
                        comboboxProps={"shadow": "md"},
                    ),
                ),
            ],
            className="kv-toolbar",
        ),
        status_line("replay-status"),
        player(one_of(query.get("speed"), SPEEDS, "16")),
        panel(
            "Retained mass, over all layers and heads",
            html.Div(
                [
                    graph("replay-mass", retained_mass([], request.tokens), "kv-graph"),
                    html.Div(id="replay-cursor", className="kv-cursor"),
                ],
                className="kv-graph-box",
            ),
            aside=button("replay-csv", "CSV", "Save the retained mass of the chosen replays"),
        ),
        *curve(rows),
        table(rows),
        runner(),
    ]


def curve(rows: list[dict[str, Any]]) -> list[Component]:
    """Retained mass over budget, where some policy was replayed at several."""
    figure = budget_curve(rows)
    if figure is None:
        return []
    drawn = html.Div(graph("replay-curve", figure, "kv-graph"), className="kv-graph-box")
    return [panel("Retained mass over budget", drawn)]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by budget as first met, and within it as the policies are listed."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    policies = [policy.name for policy in policy_help()]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        name = row["policy"].partition(":")[0]
        known = policies.index(name) if name in policies else len(policies)
        return budgets.index(row["budget"]), known

    return sorted(rows, key=place)


def replay_options(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored results for the drop-down, grouped by budget."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        option = {"value": row["replay"], "label": row["label"]}
        groups.setdefault(f"Budget {row['budget']}", []).append(option)
    return [{"group": group, "items": items} for group, items in groups.items()]


def chosen_replays(rows: Sequence[dict[str, Any]], asked: str | None) -> list[str]:
    """Replays of the URL that exist; without any, those of one budget, the usual one first."""
    known = [row["replay"] for row in rows]
    if asked is not None:
        return [one for one in asked.split(" ") if one in known][:MAX_CARDS]
    budgets = {row["budget"]: None for row in rows}
    budget = PREFERRED_BUDGET if PREFERRED_BUDGET in budgets else next(iter(budgets), None)
    return [row["replay"] for row in rows if row["budget"] == budget][:MAX_CARDS]


def player(speed: str) -> Component:
    """Transport controls and the policies' cards."""
    return panel(
        "Cache contents",
        [
            transport("replay", "token", SPEEDS, speed),
            html.Div(id="replay-cards", className="kv-cards"),
            html.Div(id="replay-tip", className="kv-tip"),
        ],
        aside=html.Div(id="replay-legend", className="kv-legend"),
        class_name="kv-player",
    )


def table(rows: list[dict[str, Any]]) -> Component:
    """Every stored result."""
    rows_grid = grid(
        "replay-grid",
        COLUMNS,
        "No replay is stored in this trace yet",
        rowData=rows,
        getRowId="params.data.replay",
    )
    return panel("Results", rows_grid, class_name="kv-flush")


def runner() -> Component:
    """The form that computes new replays."""
    policies = policy_help()
    form = html.Div(
        [
            field(
                "Policies",
                dmc.TagsInput(
                    id="replay-policies",
                    data=[policy.name for policy in policies],
                    value=[],
                    size="xs",
                    splitChars=[" "],
                    placeholder="h2o, streaming_llm:sinks=8",
                    className="kv-policies-input",
                    comboboxProps={"shadow": "md"},
                ),
            ),
            field(
                "Budgets",
                dmc.TagsInput(
                    id="replay-budgets",
                    data=["10%", "25%", "50%", "64", "128"],
                    value=["25%"],
                    size="xs",
                    placeholder="25% or 128",
                    className="kv-budgets-input",
                    comboboxProps={"shadow": "md"},
                ),
            ),
            field("Decide", segmented("replay-when", WHENS, "default")),
            button("replay-run", "Run replay", "Compute and store these replays", "kv-primary"),
        ],
        className="kv-toolbar kv-runner",
    )
    return panel(
        "Replay other policies",
        [form, *work_line("replay-run"), policy_list(policies)],
    )


def policy_list(policies: list[PolicyHelp]) -> Component:
    """What each policy does and takes, folded."""
    rows: list[Component] = []
    for policy in policies:
        taken = [html.Code(text, title=meaning) for text, meaning in policy.parameters]
        rows += [html.Dt(html.Code(policy.name)), html.Dd([html.Span(policy.idea), *taken])]
    note = html.P(
        "Parameters follow a colon: h2o:recent=25%,sinks=4. Every policy takes sinks= and recent=, "
        "the first and last tokens that are never evicted.",
        className="kv-note",
    )
    return html.Details(
        [html.Summary("What the policies do"), note, html.Dl(rows)], className="kv-policies"
    )
