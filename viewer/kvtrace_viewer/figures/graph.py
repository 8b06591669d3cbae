"""The one place where graphs are made, so that none can reach another host."""

from __future__ import annotations

from typing import Any

from dash import dcc

# "Share chart" is on by default and would upload the data; the logo links outside.
LOCAL_ONLY_CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "responsive": True,
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


def graph(graph_id: str, figure: dict[str, Any], class_name: str = "") -> dcc.Graph:
    """Make a graph component that stays on this machine."""
    return dcc.Graph(
        id=graph_id,
        figure=figure,
        className=class_name,
        config={
            **LOCAL_ONLY_CONFIG,
            "toImageButtonOptions": {"format": "png", "scale": 2, "filename": graph_id},
        },
    )
