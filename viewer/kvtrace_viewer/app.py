"""The viewer's application: pages, routes and assets around one folder of traces."""

from __future__ import annotations

from pathlib import Path

import dash
from fastapi import FastAPI

from kvtrace_viewer import api, shell
from kvtrace_viewer.asgi import ask
from kvtrace_viewer.components import empty_state
from kvtrace_viewer.context import Context
from kvtrace_viewer.library import TraceLibrary
from kvtrace_viewer.pages import PAGES
from kvtrace_viewer.security import SameOriginOnly

ASSETS = Path(__file__).parent / "assets"


def create_app(trace_root: Path, host_names: frozenset[str] = frozenset()) -> dash.Dash:
    """Make the viewer of the traces under a folder.

    Dash keeps its list of pages in the process, so a process serves the app it made last.

    Parameters
    ----------
    trace_root
        A folder of traces, or a single trace.
    host_names
        Host names to answer to beside addresses and localhost.
    """
    context = Context.of(TraceLibrary(Path(trace_root)))
    dash.page_registry.clear()
    app = dash.Dash(
        "kvtrace_viewer",
        backend="fastapi",
        use_pages=True,
        pages_folder="",
        assets_folder=str(ASSETS),
        title="kvtrace",
        update_title=None,
        # Pages come and go, so most ids are not in the first layout.
        suppress_callback_exceptions=True,
        serve_locally=True,
        index_string=shell.INDEX,
    )
    for order, page in enumerate(PAGES):
        page.register(app, context, order)
    # The name by which Dash finds what to show for an address that is no page.
    dash.register_page(
        "not_found_404",
        path="/404",
        title="Not found · kvtrace",
        layout=empty_state("There is no such page", "Choose one of the pages above."),
    )
    app.layout = lambda: shell.layout(context)
    shell.register(app, context)
    server: FastAPI = app.server
    api.register(server, context)
    server.add_middleware(SameOriginOnly, host_names=host_names)
    # Dash collects assets and pages on the first request, but under FastAPI only on one for "/" or
    # its own routes: a viewer first opened by a link to another page would lack every script.
    ask(server, "/")
    return app
