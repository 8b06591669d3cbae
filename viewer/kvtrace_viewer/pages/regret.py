"""What was evicted and wanted later: the tokens, and the queries that wanted them."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import dash
from dash import Input, Output, State, dcc, html

from kvtrace.cached import cached_requests
from kvtrace.errors import KvtraceError
from kvtrace.trace import Trace
from kvtrace_viewer.components import Component, empty_state, field, panel, select, status_line
from kvtrace_viewer.context import Context
from kvtrace_viewer.derived.results import replay_rows
from kvtrace_viewer.derived.wanted import query_wants, wanted_tokens
from kvtrace_viewer.grids import grid, number_column, text_column
from kvtrace_viewer.pages.common import choose_request, request_options, with_trace
from kvtrace_viewer.pages.replay import in_order, replay_options

PATH = "/regret"
NAME = "Regret"
TOKENS = 200
QUERIES = 200
HINT = "Choose a token above: the queries that wanted it stand here."

SHARE = {"function": "kvShare(params.value)"}
TEXT = {"function": "kvText(params.value)"}
TOKEN_COLUMNS = [
    number_column("position", "Token", width=88),
    text_column(
        "text", "Text", minWidth=120, flex=1, valueFormatter=TEXT, cellClass="kv-mono",
        tooltipField="text",
    ),
    number_column("evicted_at", "Evicted after", width=118),
    number_column("regret", "Regret", width=96, valueFormatter=SHARE, sort="desc"),
    number_column("misses", "Misses", width=90),
    number_column("heads", "Heads", width=80),
    number_column("query", "Most by", width=92),
    text_column("query_text", "Its text", minWidth=110, flex=1, valueFormatter=TEXT,
        cellClass="kv-mono", tooltipField="query_text"),
    number_column("attention", "Attention", width=104, valueFormatter=SHARE),
]  # fmt: skip
QUERY_COLUMNS = [
    number_column("query", "Query", width=88, cellRenderer="KvRegretLink"),
    text_column("query_text", "Text", minWidth=120, flex=1, valueFormatter=TEXT,
        cellClass="kv-mono", tooltipField="query_text"),
    number_column("attention", "Attention", width=104, valueFormatter=SHARE, sort="desc"),
    number_column("layer", "Layer", width=80),
    number_column("q_head", "Head", width=80),
    number_column("kv_head", "KV head", width=90),
    number_column("evicted_at", "Evicted after", width=118),
    number_column("regret", "Regret of the head", width=150, valueFormatter=SHARE),
    number_column("misses", "Misses of the head", width=150),
]  # fmt: skip


def register(app: Any, context: Context, order: int) -> None:
    """Add the page and its callbacks."""
    dash.register_page(
        "regret",
        path=PATH,
        name=NAME,
        order=order,
        title="Regret · kvtrace",
        layout=partial(layout, context),
    )
    computing = threading.Lock()
    app.callback(
        Output("regret-tokens", "rowData"),
        Output("regret-summary", "children"),
        Output("regret-tokens", "selectedRows"),
        Input("regret-replay", "value"),
        Input("regret-request", "value"),
        State("regret-config", "data"),
    )(partial(show_tokens, context, computing))
    app.callback(
        Output("regret-queries", "rowData"),
        Output("regret-asked", "children"),
        Input("regret-tokens", "selectedRows"),
        State("regret-replay", "value"),
        State("regret-config", "data"),
    )(partial(show_queries, context))
    app.clientside_callback(
        dash.ClientsideFunction("regret", "address"),
        Output("regret-status", "title"),
        Input("regret-replay", "value"),
        Input("regret-request", "value"),
        Input("regret-config", "data"),
    )


def layout(context: Context, trace: str | None = None, **query: str) -> Component:
    """Build the page for the trace and view of the URL."""
    body = with_trace(context, trace, lambda found, opened: build(found, opened, query))
    return html.Div(body, className="kv-page")


def build(trace_id: str, trace: Trace, query: dict[str, str]) -> Component:
    """Build the page of a trace that has tokens."""
    rows = in_order(replay_rows(trace))
    if not rows:
        return empty_state(
            "No replay yet",
            f"Regret is what a policy evicted and queries wanted later; {trace.name} has no "
            "replay. Run one on the Replay page, or:",
            f"kvtrace replay {trace.path} --policy h2o --budget 25% --regret",
        )
    known = [row["replay"] for row in rows]
    chosen = query.get("replay", "")
    shown = chosen if chosen in known else _most_evicting(rows)
    requests = [one for one in trace.requests() if one.request in set(cached_requests(trace))]
    request = choose_request(requests, query.get("request"))
    return [
        dcc.Store(id="regret-config", data={"trace": trace_id}),
        html.Div(
            [
                field(
                    "Replay", select("regret-replay", replay_options(rows), shown, 320, "Replay")
                ),
                field(
                    "Request",
                    select(
                        "regret-request",
                        request_options(requests),
                        str(request.request),
                        190,
                        "Request",
                    ),
                ),
            ],
            className="kv-toolbar",
        ),
        status_line("regret-status"),
        panel(
            "Evicted and wanted later",
            dcc.Loading(
                choice_grid("regret-tokens", TOKEN_COLUMNS, "Nothing that was evicted was wanted")
            ),
            aside=html.Span(id="regret-summary", className="kv-note"),
            class_name="kv-flush",
        ),
        panel(
            "Who wanted it",
            choice_grid("regret-queries", QUERY_COLUMNS, "No token is chosen"),
            aside=html.Span(HINT, id="regret-asked", className="kv-note"),
            class_name="kv-flush",
        ),
    ]


def choice_grid(grid_id: str, columns: list[dict[str, Any]], nothing: str) -> Component:
    """A grid of which one row can be chosen."""
    one_row = {"mode": "singleRow", "checkboxes": False, "enableClickSelection": True}
    return grid(grid_id, columns, nothing, height=340, options={"rowSelection": one_row})


def show_tokens(
    context: Context, computing: threading.Lock, replay: str, request: str, config: dict[str, str]
) -> tuple[list[Any], str, list[Any]]:
    """Rows of the upper grid, what they sum to, and the row that is chosen at first.

    They are computed and kept where they were not yet.
    """
    try:
        trace = context.library.open(config["trace"])
        with computing:
            _ensure(trace, replay)
        rows = wanted_tokens(trace, replay, TOKENS, int(request))
    except (KvtraceError, OSError) as error:
        return [], f"{error}", []
    total = trace.sql(
        "select coalesce(sum(regret), 0) s, count(distinct position) n from replay_regrets where "
        f"replay = '{replay.replace(chr(39), chr(39) * 2)}' and request = {int(request)}"
    ).to_pylist()[0]
    shown = f", the first {TOKENS} shown" if total["n"] > TOKENS else ""
    words = (
        f"{total['n']:,} tokens{shown}; all regrets sum to {total['s']:,.4g}, the attention lost "
        "over layers, heads and rows"
    )
    return rows, words, rows[:1]


def show_queries(
    context: Context, selected: list[dict[str, Any]] | None, replay: str, config: dict[str, str]
) -> tuple[list[Any], str]:
    """Rows of the lower grid for the token chosen in the upper one."""
    if not selected:
        return [], HINT
    token = selected[0]
    try:
        trace = context.library.open(config["trace"])
        rows = query_wants(trace, replay, token["request"], token["position"], QUERIES)
    except (KvtraceError, OSError) as error:
        return [], f"{error}"
    where = {"trace": config["trace"], "request": token["request"], "key": token["position"]}
    words = f"Token {token['position']}: at most four queries of each head; a number opens the map"
    return [row | where for row in rows], words


def _most_evicting(rows: list[dict[str, Any]]) -> str:
    return str(max(rows, key=lambda row: row["misses"] or 0)["replay"])


def _ensure(trace: Trace, replay: str) -> None:
    """Compute the regrets of a stored result where nobody has."""
    # Imported here because it pulls in numba, which takes a second the first time.
    from kvtrace_viewer.replay.regret import (
        compute_regrets,
        has_regrets,
        store_regrets,
        stored_evictions,
    )

    if has_regrets(trace, replay):
        return
    found = compute_regrets(trace, {replay: stored_evictions(trace, replay)})
    store_regrets(trace, replay, found[replay])
