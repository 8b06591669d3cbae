"""The frame around every page: product name, navigation, trace picker, light and dark."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlencode

import dash
import dash_mantine_components as dmc
from dash import Input, Output, State, dcc, html

from kvtrace_viewer.components import Component
from kvtrace_viewer.context import Context
from kvtrace_viewer.figures.theme import FONT
from kvtrace_viewer.pages import PAGES

MONOSPACE = (
    'ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "Liberation Mono", '
    '"DejaVu Sans Mono", monospace'
)
# Ten tones, as Mantine asks for; 6 is used on light ground and 4 on dark.
ACCENT = [
    "#eef3ff", "#dbe5ff", "#b8cbff", "#92afff", "#7396f5",
    "#4a72e0", "#2f5bd7", "#264bb4", "#1f3d92", "#183174",
]  # fmt: skip
LOCATION = "_pages_location"

# The scheme is set before the first paint, so that a dark page does not flash white.
INDEX = """<!DOCTYPE html>
<html lang="en">
    <head>
        {%metas%}
        <title>{%title%}</title>
        <link rel="icon" type="image/svg+xml" href="/assets/logo.svg">
        {%css%}
        <script>
            (function () {
                var scheme = localStorage.getItem("mantine-color-scheme-value");
                if (scheme !== "light" && scheme !== "dark") {
                    scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
                }
                document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
            })();
        </script>
    </head>
    <body>
        {%app_entry%}
        <footer>{%config%}{%scripts%}{%renderer%}</footer>
    </body>
</html>"""


def layout(_context: Context) -> Component:
    """Build the frame; the page container is filled by Dash."""
    header = html.Header(
        [
            dcc.Link(
                [html.Img(src="/assets/logo.svg", alt=""), html.Span("kvtrace")],
                href="/",
                className="kv-brand",
            ),
            html.Nav(id="nav", className="kv-nav"),
            html.Div(className="kv-spacer"),
            html.Span("Trace", className="kv-label"),
            dmc.Select(
                id="trace-picker",
                size="xs",
                w=260,
                searchable=True,
                allowDeselect=False,
                nothingFoundMessage="No such trace",
                placeholder="No traces",
                maxDropdownHeight=360,
                attributes={"input": {"aria-label": "Trace"}},
            ),
            dmc.ColorSchemeToggle(
                id="color-scheme",
                lightIcon=html.Span("☀", className="kv-scheme-icon"),
                darkIcon=html.Span("☾", className="kv-scheme-icon"),
                size="md",
                variant="subtle",
                color="gray",
                **{"aria-label": "Switch between light and dark"},
            ),
        ],
        className="kv-header",
    )
    return dmc.MantineProvider(
        [
            html.Div([header, html.Main(dash.page_container, className="kv-main")]),
            dcc.Store(id="shown-trace"),
        ],
        theme={
            "primaryColor": "kv",
            "colors": {"kv": ACCENT},
            "primaryShade": {"light": 6, "dark": 5},
            "fontFamily": FONT,
            "fontFamilyMonospace": MONOSPACE,
            "defaultRadius": 6,
        },
        defaultColorScheme="auto",
    )


def register(app: Any, context: Context) -> None:
    """Add the callbacks that keep the header in step with the address."""
    app.callback(
        Output("nav", "children"),
        Output("trace-picker", "data"),
        Output("trace-picker", "value"),
        Output("shown-trace", "data"),
        Input(LOCATION, "pathname"),
        Input(LOCATION, "search"),
    )(lambda pathname, search: header_state(context, pathname or "/", search or ""))
    app.clientside_callback(
        dash.ClientsideFunction("shell", "pick"),
        Output(LOCATION, "href"),
        Input("trace-picker", "value"),
        State("shown-trace", "data"),
        prevent_initial_call=True,
    )


def header_state(
    context: Context, pathname: str, search: str
) -> tuple[list[Component], list[dict[str, str]], str | None, str | None]:
    """Navigation links that keep the trace, the traces to pick from, and the one shown."""
    options = [
        {"value": trace_id, "label": trace_id.removesuffix(".kvtrace")}
        for trace_id in context.library.paths()
    ]
    asked = parse_qs(search.removeprefix("?")).get("trace", [None])[0]
    shown = asked or context.library.default_id()
    query = f"?{urlencode({'trace': shown}, safe='/')}" if shown else ""
    links = [
        dcc.Link(
            page.NAME,
            href=page.PATH if page.PATH == "/" else page.PATH + query,
            className="kv-nav-link" + (" kv-active" if pathname == page.PATH else ""),
        )
        for page in PAGES
    ]
    known = shown if any(option["value"] == shown for option in options) else None
    return links, options, known, known
