"""SQL over a trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import dash
import dash_mantine_components as dmc
from dash import Input, Output, dcc, html

from kvtrace.trace import Trace
from kvtrace_viewer.components import Component, button, panel, status_line
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.catalog import Table, tables
from kvtrace_viewer.grids import grid
from kvtrace_viewer.pages.common import with_trace

PATH = "/sql"
NAME = "SQL"

EXAMPLES = (
    (
        "Attention sinks",
        "select position, text, count(*) as heads, round(max(mean_attention), 3) as strongest\n"
        "from sink_tokens\nwhere far_queries >= 64\ngroup by position, text\n"
        "order by heads desc, strongest desc\nlimit 20",
    ),
    (
        "What heads do",
        "select layer, q_head, round(entropy_share, 3) as entropy,\n"
        "       round(sparsity, 3) as sparsity, round(local_share, 3) as local,\n"
        "       round(sink_share, 3) as sinks\n"
        "from head_summary\nwhere request = 0\norder by layer, q_head",
    ),
    (
        "Latency of requests",
        "select request, prompt_tokens, generated_tokens, time_to_first_token_ms,\n"
        "       time_per_output_token_ms, tokens_per_second\n"
        "from request_latency\norder by request",
    ),
    (
        "KV memory by step",
        "select step, device, max(device_bytes) as bytes\nfrom kv_memory\n"
        "group by step, device\norder by step\nlimit 1000",
    ),
    (
        "Attention on the prompt",
        "select position, layer, round(mass(row, layer, 0, 0, prompt_tokens), 4) as on_prompt\n"
        "from rows join requests using (request), layers\n"
        "where request = 0 and position >= prompt_tokens and layer < 2\n"
        "order by layer, position",
    ),
    (
        "Steps by phase",
        "select phase, count(*) as steps, sum(num_tokens) as tokens,\n"
        "       round(avg(duration_ns) / 1e6, 2) as mean_ms\n"
        "from steps\ngroup by phase\norder by phase desc",
    ),
    (
        "Most frequent tokens",
        "select text, count(*) as times\nfrom tokens\ngroup by text\n"
        "order by times desc, text\nlimit 20",
    ),
    (
        "Replays, best first",
        "select budget, place, policy, round(retained_mass, 4) as retained_mass,\n"
        "       round(behind_best, 4) as behind_best, round(lost_to_policy, 4) as lost_to_policy\n"
        "from replay_compare\norder by budget, place",
    ),
    (
        "Blocks by device",
        "select device, event, count(*) as events, count(distinct block) as blocks\n"
        "from kv_events\nwhere block is not null\ngroup by all\norder by all",
    ),
    ("What is missing", "select what, count, reason\nfrom gaps"),
)


#: What the page begins with: it needs nothing computed.
FIRST = next(sql for name, sql in EXAMPLES if name == "Steps by phase")

_HEADINGS = {
    "view": "Views",
    "function": "Functions",
    "derived": "Derived from q and k",
    "recorded": "Recorded",
}


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "sql",
        path=PATH,
        name=NAME,
        order=order,
        title="SQL · kvtrace",
        layout=partial(layout, context),
    )
    app.clientside_callback(
        dash.ClientsideFunction("sql", "mount"),
        Output("sql-status", "title"),
        Input("sql-config", "data"),
    )
    app.clientside_callback(
        dash.ClientsideFunction("sql", "example"),
        Output("sql-text", "value"),
        Input("sql-examples", "value"),
        prevent_initial_call=True,
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and query of the URL."""
    body = with_trace(
        context, trace, lambda found, opened: build(found, opened, query), needs_tokens=False
    )
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace that opens."""
    config = {"trace": trace_id, "run": "q" in query}
    text = query.get("q") or FIRST
    return html.Div(
        [
            dcc.Store(id="sql-config", data=config),
            html.Div([editor(text), results()], className="kv-sql-main"),
            panel("Tables", schema_list(tables(trace)), class_name="kv-schema"),
        ],
        className="kv-sql",
    )


def editor(text: str) -> Component:
    """Where the query is written."""
    examples = dmc.Select(
        id="sql-examples",
        data=[{"value": sql, "label": name} for name, sql in EXAMPLES],
        placeholder="Examples",
        size="xs",
        w=190,
        comboboxProps={"shadow": "md"},
        attributes={"input": {"aria-label": "Example queries"}},
    )
    run = button("sql-run", ["Run", html.Kbd("Ctrl ⏎")], "Run the query", "kv-primary")
    area = dmc.Textarea(
        id="sql-text",
        value=text,
        autosize=True,
        minRows=6,
        maxRows=18,
        spellCheck=False,
        className="kv-editor",
        attributes={"input": {"aria-label": "SQL"}},
    )
    return panel("Query", area, aside=[examples, run])


def results() -> Component:
    """Where the answer appears."""
    answer = grid(
        "sql-grid",
        [],
        "No rows",
        height="100%",
        defaultColDef={"sortable": True, "resizable": True, "filter": True, "minWidth": 90},
    )
    aside = [
        html.Span(id="sql-timing"),
        button("sql-csv", "CSV", "Save all rows of the answer, up to a million"),
    ]
    body = [status_line("sql-status"), html.Div(answer, className="kv-sql-grid")]
    return panel("Result", body, aside=aside, class_name="kv-grow kv-sql-result")


def schema_list(found: list[Table]) -> Component:
    """Tables, views and functions with their columns, types and comments, folded."""
    parts: list[Component] = []
    for kind, heading in _HEADINGS.items():
        parts.append(html.H3(heading))
        parts += [_entry(table) for table in found if table.kind == kind]
    return html.Div(parts)


def _entry(table: Table) -> Component:
    rows = "" if table.num_rows is None else f"{table.num_rows:,}"
    columns = [
        child
        for column in table.columns
        for child in (
            html.Dt([html.Code(column.name), html.Span(column.type)]),
            html.Dd(column.comment or ""),
        )
    ]
    return html.Details(
        [
            html.Summary([html.Code(table.name), html.Span(rows)]),
            html.P(table.comment, className="kv-note"),
            html.Dl(columns),
        ]
    )
